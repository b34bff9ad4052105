"""The command line. `app.build_app` makes it, `app.run` runs it with the one error handler; `workers.main` adds `up` and `demo`."""
