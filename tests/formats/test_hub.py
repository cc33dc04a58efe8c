from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from bitpalette.formats.base import open_source
from bitpalette.formats.errors import FormatError


def test_a_fetched_model_opens_as_a_directory(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fetch(repo_id: str, **options: object) -> str:
        asked.append(repo_id)
        return str(plain)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert open_source("org/name").config["model_type"] == "llama" and asked == ["org/name"]


@pytest.mark.parametrize("error", [LocalEntryNotFoundError("no cache\nno network"), ConnectionError(), TimeoutError()])
def test_no_network_is_one_line(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(repo_id: str, **options: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(FormatError, match=r"'org/name' is no path here.*no hub could be reached") as caught:
        open_source("org/name")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["/org/name", "a/b/c", "name", "org/name?x", "./org"])
def test_what_is_no_hub_id_is_not_asked_for(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("asked the hub"))
    with pytest.raises(FormatError, match="no such model"):
        open_source(path)
