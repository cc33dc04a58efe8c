"""A hub id such as `org/name`: fetched into huggingface_hub's cache, then opened as a directory."""

from __future__ import annotations

import os
import re

from .base import Source
from .errors import FormatError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")

WANTED = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py", "LICENSE*"]
"""File patterns: safetensors and what stands beside them; no weights of other frameworks."""

ANSWER_SECONDS = 10.0
"""How long the hub may take to answer a question about metadata before it counts as out of reach."""


class HubFormat:
    name = "hub"

    def sniff(self, path: str) -> bool:
        return not os.path.exists(path) and HUB_ID.fullmatch(path) is not None

    def open(self, path: str) -> Source:
        """Download (or take from the cache; HF_HUB_OFFLINE is honoured) and open. One FormatError line otherwise."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError

        from .base import open_source

        try:
            local = snapshot_download(path, allow_patterns=WANTED, etag_timeout=ANSWER_SECONDS)
        except GatedRepoError as error:
            raise FormatError(f"hub model {path!r} is gated: accept its terms on the hub, then log in") from error
        except RepositoryNotFoundError as error:
            raise FormatError(f"no such model: {path!r} is neither a path here nor on the hub (or private)") from error
        except HFValidationError as error:
            raise FormatError(f"no such model: {path!r} is neither a path here nor a valid hub id") from error
        except HfHubHTTPError as error:
            raise FormatError(f"the hub refused {path!r}: {error}") from error
        except Exception as error:
            # no route, offline mode, nothing cached; which HTTP library raises depends on the version
            raise FormatError(
                f"no such model: {path!r} is no path here, not in the hub cache, and no hub could be reached "
                f"({type(error).__name__}); check the path or the network"
            ) from error
        return open_source(local)


FORMAT = HubFormat()
