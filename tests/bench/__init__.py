"""``make bench``: what routerd costs, side by side with other proxies, on this machine, in one run.

What is compared
----------------
The same requests go to the same upstream through every target: ``direct`` (no proxy: what the instruments themselves
take), nginx ``proxy_pass`` (about the least a proxy can cost), routerd with tokens, breakers, quotas, metrics and its
log switched on, and LiteLLM's proxy. A target that cannot run here is skipped by name, with the reason.

How
---
* The upstream (``upstream.c``) and the load generator (``load.c``) are small C programs, so that what is measured is
  the proxy. How the upstream answers is asked for in the request's body and so survives any proxy.
* The server under test has one core for itself; upstream, load, the TLS front and this program share another.
* Every figure is measured in several rounds. Within a round the targets take turns and the order rotates, so a busy
  minute of the machine hits all of them; the table shows medians, and the spread of routerd's rounds beside them.
* *Added* time is the target's percentile minus that of ``direct`` in the same round.
* CPU is the kernel's own count for the process, its threads (ended ones too) and its children, before and after. It is
  steadier than a rate, and says what a rate hides.
* An answer counts only if it is right and whole: status 200, its last words, every event, the terminal marker.
* Each event is stamped by the upstream and read by the load generator on the same clock: *transit* is the difference.
  Streams do not tick together; 500 streams of one event each 50 ms are 10,000 lone events a second.
* Memory is PSS. *Per open stream* is the peak of a freshly started, warmed server minus what it had just before.
* Cold start is from the spawn until the first proxied 200, asked for every few milliseconds; idle PSS a second later.
* The TLS figures compare two ways to the same upstream, both through an nginx beside it: one ends TLS there, one does
  not. So the hop is in both and cancels; connections to it are kept and reused.
* Planning is timed inside this process, by calling the planner itself, in CPU time.
* Translated streams: the upstream plays the dialect that the path names, and routerd is asked in each for each. The
  rate is that of 16 streams that come as fast as they are read, in large reads; the added time to the first event is
  that of one short stream after the other, minus the same stream from the upstream directly, in its own dialect.
* What recovery costs a healthy stream: the same daemon is run twice, once as it is and once with stand-ins for the gate
  and the transcript that hold, check and remember nothing (``bare.py``); both get the same streams in turns, with 20
  tools on offer. CPU is per event, in percent of the bare one's. As fast as they are read, an event takes so little of
  anything that this is the dearest recovery can look; at an agent's pace it drowns in the cost of the wake-ups. What
  the same code takes by itself is timed in this process as well, and how many texts were held back is counted.
* What other programs took of the machine meanwhile is printed with the table: it says how far to trust the rest.

What it does not measure
------------------------
Networks, slow clients, faults and what recovery takes when there are some; kernel memory of sockets; several cores or
machines; anything over minutes. Loopback makes the sender pay for the receiver's network stack. ``direct`` never leaves
its core, while every proxy is charged two wake-ups of another one. From 16 connections on nginx is held back by the
load generator: read its CPU. For the others the loop is saturated: read the rate, not the latency. PSS shares the pages
of the Python binary with whatever else runs it, this program included (2 to 3 MB). On a virtual machine differences
below 20 % are noise.
"""
