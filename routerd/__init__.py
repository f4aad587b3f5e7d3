"""routerd: one local endpoint that keeps an unattended agent's model calls alive.

A map of the house
------------------
``canonical``   the words all share: events, frames, outcomes, failures, upstreams, limits. Structs, no behaviour.

Pure: they get bytes, structs, ``now``, ``wall`` and ``draw``, and never touch a clock, a socket or a random number.

``dialects/``   wire bytes <-> canonical events, one module per wire API. ``sse`` cuts frames, whole ones only.
``policy/``     decides. ``classify``: what a refusal means (the verdict table). ``breaker``, ``quota``, ``meters``:
                who may be asked. ``balance``: who is best, in dollars. ``patience``: how long to wait. ``transcript``:
                what may go downstream and what has. ``calls``: is a tool call fit to be acted upon. ``recovery``: what
                to do after a failure. ``splice``: joining a new answer to the text already sent. ``memory``: reasoning
                that clients leave out. ``answers``: conversations that are gone on with by naming their last answer.
``providers/``  what differs per vendor: rate-limit headers, status overrides. One small file per quirky vendor.
``catalog/``    shipped data: provider presets, models with prices and windows. ``fresh``: price lists from outside.

``config``      TOML -> frozen structs, or every mistake at once.
``telemetry``   every metric name, and the one log line per exchange.
``state/``      what outlives the process.

The shell: it does what the pure part decided.

``proxy/``      ``app``: HTTP paths and admission (``guard``). ``exchange``: one client request, the loop over attempts.
                ``planner``: the choice. ``pool``: taking and settling. ``live``: accounts, upstreams, routes.
                ``attempt``: one upstream call under its watchdog. ``race``: two of them, for a first token.
                ``downstream``: the client's side. ``client``: the upstream's. ``queue``: who waits. ``deadline``: how
                long a client does. ``chain``: conversations put together at the door. ``service``: start, drain, stop.
                ``refresh``, ``repricing``: fresh prices. ``simulated``: scripted upstreams
                (``scripts``, ``strikes``). ``drill``: faults by script (``tasks``, ``spending``), who takes part
                (``stage``), what must hold (``laws``) and what came of it (``report``).
``cli/``        one file per command.

One exchange in eight steps: accept (app) - admit (app, guard) - plan (planner) - dispatch (pool, client) - classify
(providers, policy) - relay (attempt) - recover (recovery) - settle (pool). Imports go one way, from the end of this
list to its beginning; ``tests/test_tidy.py`` holds that, and the purity, in place.
"""

__version__ = "0.1.0"
