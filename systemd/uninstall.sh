#!/bin/sh
# Removes what install.sh installed. Configuration and state stay, unless PURGE=1: make uninstall PURGE=1
set -eu

scope=system
[ "${1:-}" = "--user" ] && scope=user
say() { printf 'routerd: %s\n' "$*" >&2; }

if [ "$scope" = user ]; then
    systemctl="systemctl --user"
    home=$HOME/.local/share/routerd
    etc=${XDG_CONFIG_HOME:-$HOME/.config}/routerd
    state=${XDG_STATE_HOME:-$HOME/.local/state}/routerd
    units=${XDG_CONFIG_HOME:-$HOME/.config}/systemd/user
    command=$HOME/.local/bin/routerd
else
    [ "$(id -u)" -eq 0 ] || { say "needs root (sudo make uninstall), or --user"; exit 1; }
    systemctl=systemctl
    home=/opt/routerd
    etc=/etc/routerd
    state=/var/lib/routerd
    units=/etc/systemd/system
    command=/usr/local/bin/routerd
fi

for unit in $($systemctl list-units --plain --no-legend --all 'routerd@*.s*' | cut -d' ' -f1); do
    $systemctl disable --quiet --now "$unit" || true
done
# The socket first, so that no client wakes the service again.
$systemctl disable --quiet --now routerd.socket routerd.service 2>/dev/null || true
rm -f "$units"/routerd.service "$units"/routerd.socket "$units"/routerd@.service "$units"/routerd@.socket
for unit in hermes-gateway.service hermes-gateway-.service; do
    rm -f "$units/$unit.d/routerd.conf"
    rmdir "$units/$unit.d" 2>/dev/null || true
done
$systemctl daemon-reload
$systemctl reset-failed 'routerd*' 2>/dev/null || true
[ ! -L "$command" ] || rm -f "$command"
rm -rf "$home"

if [ "${PURGE:-}" = 1 ]; then
    rm -rf "$etc" "$state"
    if [ "$scope" = system ]; then
        rm -rf /var/lib/routerd-*
        rm -f /etc/sysusers.d/routerd.conf
        ! getent passwd routerd >/dev/null || userdel routerd
    fi
    say "removed, with configuration and state"
else
    say "removed; $etc and $state are still there (PURGE=1 removes them, too)"
fi
