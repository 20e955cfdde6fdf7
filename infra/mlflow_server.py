"""MLflow's server on tame's own database, in one process: `python -m infra.mlflow_server HOST PORT`.

`mlflow server` is two processes, of which the first imports all of MLflow to start the second, and a third would have to make
the database before: each of them takes four seconds of a core, while Prefect's server starts beside them.
"""

import sys

import uvicorn

from configs.errors import TameError
from configs.settings import home
from tasks.track.connection import database_uri
from tasks.track.mlflow_internals import server_app


def main() -> None:
    """Make the database, or bring it up to date, and serve it."""
    host, port = sys.argv[1], int(sys.argv[2])
    # Files are not proxied: a run without this server, straight into the same database, must find and write the same ones.
    app, log_config = server_app(database_uri(), home() / "mlartifacts")
    uvicorn.run(app, host=host, port=port, log_config=log_config)


if __name__ == "__main__":
    try:
        main()
    except TameError as error:
        raise SystemExit(f"tame: {error}") from None
