"""How much the accordion adds to the page, with both versions of gradio."""

from __future__ import annotations

import json
import urllib.request

OWN_COMPONENTS, OWN_HANDLERS = 11, 2  # of `page_server.page` without the accordion
MOST = 62  # components of one tab with two people; two tabs and the options in the host's settings make 149


def test_the_accordion_adds_few_components(url: str) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    config = json.load(opener.open(f"{url}config"))
    assert len(config["components"]) - OWN_COMPONENTS <= MOST
    assert len(config["dependencies"]) - OWN_HANDLERS <= 7
