#!/bin/sh
# Installs routerd as a systemd service, or upgrades it in place: make install, or systemd/install.sh --user.
#
# Every run makes a new folder beside the old one and switches a link when all is in place and the configuration has
# been checked with the new version: what fails before that leaves the running service as it was. The switch is one
# restart, which drops nothing: open answers end first, and clients wait at an address that systemd holds open.
#
# PYTHON names the interpreter (3.11 or newer). pip's own variables work: PIP_NO_INDEX, PIP_FIND_LINKS, PIP_INDEX_URL.
set -eu

source=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
python=${PYTHON:-python3}
scope=system
[ "${1:-}" = "--user" ] && scope=user

say() { printf 'routerd: %s\n' "$*" >&2; }
fail() { say "$*"; exit 1; }

if [ "$scope" = user ]; then
    [ "$(id -u)" -ne 0 ] || fail "--user is for the user whom Hermes runs as, not for root"
    systemctl="systemctl --user"
    home=${XDG_DATA_HOME:-$HOME/.local/share}/routerd
    etc=${XDG_CONFIG_HOME:-$HOME/.config}/routerd
    state=${XDG_STATE_HOME:-$HOME/.local/state}/routerd
    units=${XDG_CONFIG_HOME:-$HOME/.config}/systemd/user
    command=$HOME/.local/bin/routerd
    group=$(id -gn)
    [ "$home" = "$HOME/.local/share/routerd" ] || fail "the unit expects XDG_DATA_HOME to be ~/.local/share"
else
    [ "$(id -u)" -eq 0 ] || fail "needs root (sudo make install), or for one user only: sh systemd/install.sh --user"
    systemctl=systemctl
    home=/opt/routerd
    etc=/etc/routerd
    state=/var/lib/routerd
    units=/etc/systemd/system
    command=/usr/local/bin/routerd
    group=routerd
fi

command -v systemctl >/dev/null || fail "there is no systemd on this machine; make run starts routerd without it"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "needs Python 3.11 or newer; set PYTHON=python3.12"
"$python" -c 'import ensurepip' 2>/dev/null || fail "needs Python's venv module: apt-get install python3-venv"

# --- the new version, beside what runs ---

release=$home/release-$(date -u +%Y%m%dT%H%M%SZ)-$$
staging=$(mktemp -d)
link=$home/.current-$$
trap 'rm -rf "$staging" "$link"; [ "$(readlink "$home/current" 2>/dev/null)" = "${release##*/}" ] || rm -rf "$release"' EXIT
trap 'exit 1' HUP INT TERM

say "installing into $release"
mkdir -p "$home"
chmod 755 "$home"
umask 022
"$python" -m venv "$release"
"$release/bin/python" -m pip install --quiet --disable-pip-version-check --requirement "$source/.lock/run.txt"
# From a copy: building leaves folders behind, and the checkout is somebody's.
mkdir "$staging/source"
for part in pyproject.toml README.md LICENSE routerd; do
    cp -R "$source/$part" "$staging/source/"
done
"$release/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps "$staging/source"

# --- user, configuration, keys ---

if [ "$scope" = system ]; then
    install -D -m 644 "$source/systemd/sysusers.conf" /etc/sysusers.d/routerd.conf
    systemd-sysusers /etc/sysusers.d/routerd.conf
fi
mkdir -p "$etc/credentials"
chmod 700 "$etc/credentials"
if [ ! -e "$etc/routerd.toml" ]; then
    sed -e "s|/etc/routerd|$etc|g" -e "s|/var/lib/routerd|$state|g" -e "s|systemctl |$systemctl |g" \
        "$source/systemd/routerd.example.toml" > "$staging/routerd.toml"
    install -m 640 -g "$group" "$staging/routerd.toml" "$etc/routerd.toml"
    say "wrote $etc/routerd.toml: add a provider there"
fi

# With the keys as the service will have them; in a shell of its own, so that they go nowhere else.
check() (
    mkdir "$staging/credentials"
    for key in "$etc"/credentials/*; do
        [ ! -f "$key" ] || ln -s "$key" "$staging/credentials/key_${key##*/}"
    done
    set -a
    # shellcheck disable=SC1091
    [ ! -f "$etc/environment" ] || . "$etc/environment"
    CREDENTIALS_DIRECTORY=$staging/credentials exec "$release/bin/routerd" check --config "$etc/routerd.toml"
)
check || fail "$etc/routerd.toml does not fit this version; nothing was changed. Mend it and run this again"

# --- the switch ---

ln -s "${release##*/}" "$link"
mv -T "$link" "$home/current"
mkdir -p "$(dirname "$command")"
ln -sfn "$home/current/bin/routerd" "$command"

mkdir -p "$units"
if [ "$scope" = user ]; then
    install -m 644 "$source"/systemd/user/routerd.service "$source"/systemd/user/routerd.socket "$units/"
else
    install -m 644 "$source"/systemd/routerd*.service "$source"/systemd/routerd*.socket "$units/"
fi
# hermes-gateway-.service.d is for Hermes' named profiles: hermes-gateway-work.service and the like.
for unit in hermes-gateway.service hermes-gateway-.service; do
    install -D -m 644 "$source/systemd/hermes-gateway.service.d/routerd.conf" "$units/$unit.d/routerd.conf"
done
$systemctl daemon-reload
$systemctl enable --quiet routerd.socket routerd.service
$systemctl reset-failed routerd.socket routerd.service 2>/dev/null || true # one that gave up may try again
$systemctl start routerd.socket
$systemctl restart routerd.service
for instance in $($systemctl list-units --plain --no-legend --state=active 'routerd@*.service' | cut -d' ' -f1); do
    $systemctl restart "$instance"
done
for old in "$home"/release-*; do
    [ "$old" = "$release" ] || rm -rf "$old"
done

if [ "$scope" = user ] && [ "$(loginctl show-user "$(id -un)" --property=Linger --value 2>/dev/null)" = no ]; then
    say "it ends when you log out, unless you run: loginctl enable-linger"
fi
say "$("$command" --version) is running; see: $systemctl status routerd"
