"""Whether a Hugging Face model can be had: one look at the cache and one at the network, both short."""

from __future__ import annotations

import huggingface_hub as hub
from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from mnemoscope.errors import ModelError

SECONDS = 5.0  # to wait for an answer
_ELSE = "or give a local folder, a .gguf file or sample:smollm2-135m"


def only_cached(name: str, revision: str | None, what: str = "model", file: str = "config.json") -> bool:
    """Whether a model, or `what` else a repository holds, has to come from the cache: the network does not answer.

    `ModelError` when it can be had from neither, saying what was seen. Without this look, loading would ask again
    and again for half a minute.
    """
    doing = f"loading the {what} {name}"
    try:
        cached = isinstance(hub.try_to_load_from_cache(name, file, revision=revision), str)
        url = hub.hf_hub_url(name, file, revision=revision)
        hub.get_hf_file_metadata(url, token=hub.get_token(), timeout=SECONDS)
    except HFValidationError:
        raise ModelError(
            f"{doing}: there is no such folder or file, and it is no Hugging Face id (OWNER/NAME); {_ELSE[3:]}"
        ) from None
    except GatedRepoError:
        raise ModelError(
            f"{doing}: its owner gives it out on request only; ask on {constants.ENDPOINT}/{name} and log in with "
            f"`hf auth login`, {_ELSE}"
        ) from None
    except RevisionNotFoundError:
        raise ModelError(
            f"{doing}: it has no revision {revision!r}; give a branch, tag or commit of it"
        ) from None
    except RepositoryNotFoundError:
        raise ModelError(
            f"{doing}: there is no such folder, and {constants.ENDPOINT} knows no such {what} (or shows it to you only "
            f"when you are logged in); check the id, {_ELSE}"
        ) from None
    except EntryNotFoundError:
        raise ModelError(
            f"{doing}: it has no {file}, so it is no {what} of transformers (an adapter, or files of another format); "
            f"give another id, {_ELSE}"
        ) from None
    except (OfflineModeIsEnabled, HfHubHTTPError, OSError, ValueError) as error:
        if cached:
            return True
        raise ModelError(_unreachable(doing, error)) from error
    except Exception as error:  # whatever the HTTP library of the day raises
        if not type(error).__module__.startswith(("httpx", "httpcore", "requests", "urllib3")):
            raise
        if cached:
            return True
        raise ModelError(_unreachable(doing, error)) from error
    return False


def _unreachable(doing: str, error: Exception) -> str:
    offline = isinstance(error, OfflineModeIsEnabled)
    reason = (
        "HF_HUB_OFFLINE is set" if offline else (str(error).strip().splitlines() or [type(error).__name__])[0]
    )
    return (
        f"{doing}: there is no such folder, and as a Hugging Face model it is neither in the local cache nor reachable "
        f"({reason.rstrip('.')}); check the id and the network, {_ELSE}"
    )
