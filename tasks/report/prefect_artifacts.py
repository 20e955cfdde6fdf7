"""A result in Prefect's pages: the name of the run, a table, a page of Markdown, and links."""

import logging
import re
from uuid import UUID

from configs.errors import line
from tasks.formatting import table
from tasks.result import Result
from tasks.sentences import advice, headline, markdown, short

log = logging.getLogger("tame.report")


def create_artifacts(result: Result, mlflow_url: str | None = None, report: str | None = None) -> None:
    """Inside a flow run: Prefect's table, markdown and link artifacts, under keys that keep their history.

    The run is named by what to use, which then stands at the top of its page and in every list of runs.

    Best effort: a server that refuses one is said in a line, and the release goes on.
    """
    from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact
    from prefect.client.orchestration import get_client
    from prefect.runtime import flow_run

    key = re.sub(r"[^a-z0-9]+", "-", result.recipe.name.lower()).strip("-")
    summary = " ".join(sentence for sentence in (advice(result), headline(result)) if sentence)
    try:
        with get_client(sync_client=True) as client:
            client.update_flow_run(UUID(str(flow_run.get_id())), name=f"{result.recipe.name}: {short(result)}")
        create_table_artifact(key=f"{key}-variants", table=table(result), description=summary)
        place = f"[report.html]({mlflow_url}/artifacts/report.html)" if mlflow_url else f"`{report}`"
        where = f"\nThe report is at {place}.\n" if report else ""
        create_markdown_artifact(key=f"{key}-summary", markdown=markdown(result) + where, description=short(result))
        if mlflow_url:
            create_link_artifact(key=f"{key}-mlflow", link=mlflow_url, link_text="MLflow run", description=summary)
        for variant in result.variants:
            if variant.published and variant.published.startswith("https://"):
                name = re.sub(r"[^a-z0-9]+", "-", variant.name.lower()).strip("-")
                create_link_artifact(
                    key=f"{key}-{name}-hub", link=variant.published, link_text=f"{variant.name} on the Hub"
                )
    except Exception as error:  # the numbers are in result.json
        log.warning("Prefect took no artifact (%s)", line(error))


def show_card(result: Result, label: str, card: str) -> None:
    """Inside a flow run: the card of a variant as it would be published, its metadata at the end. Best effort."""
    from prefect.artifacts import create_markdown_artifact

    key = re.sub(r"[^a-z0-9]+", "-", f"{result.recipe.name}-{label}-card".lower()).strip("-")
    head, text = card.removeprefix("---\n").split("\n---\n", 1)
    shown = f"{text}\nIts metadata:\n\n```yaml\n{head}\n```\n"
    try:
        create_markdown_artifact(key=key, markdown=shown, description=f"The card of {label}, as it would be published")
    except Exception as error:  # it is in MLflow, too
        log.warning("Prefect took no artifact (%s)", line(error))
