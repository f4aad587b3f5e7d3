"""The dashboards as code; what Grafana reads lies in ``dashboards/``. After a change: ``python -m grafana.build``."""
