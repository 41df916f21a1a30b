"""What people look at: the report of a run, dashboards, and analyses of routers."""
