"""A collection on the Hub that releases are put in: one page for all models of a sweep."""

import logging

from configs.errors import line
from tasks.publish.client import connect

log = logging.getLogger("tame.publish")


def collect(title: str, repo: str, private: bool) -> None:
    """Put the model `repo` into its owner's collection `title`, which is made where there is none: private, if the model is.

    Best effort, said in a line: the model is published, whatever becomes of this. What is in the collection already is not
    put there again.
    """
    try:
        api = connect()
        made = api.create_collection(title, namespace=repo.split("/")[0], private=private, exists_ok=True)
        api.add_collection_item(made.slug, repo, "model", exists_ok=True)
    except Exception as error:  # whatever the Hub says to it
        log.warning("%s is published, but not in the collection %r (%s)", repo, title, line(error))
        return
    log.debug("%s is in the collection %s", repo, made.url)
