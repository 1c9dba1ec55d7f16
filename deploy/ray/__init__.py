"""Precis on a Ray cluster: the same application and the same engine, one replica for each GPU or share of the cores.

`application.py` builds it, `replica.py` is what runs in each process, `autoscaling.py` and `routing.py` decide how many
there are and which of them a request goes to, `proxy.py` is what Serve's HTTP proxies are told besides. Ray is imported
here and nowhere in `app`; docs/scaling.md says how it is run.
"""
