"""Publishing an export as a repository of the hub, by the hub's own client.

What can be refused is refused first, before an export is written or a byte is sent: a name that cannot be one, nobody
who is logged in, a token that may only read, an owner that is not yours, a repository that others could see. The upload
itself goes on where an earlier one stopped, and one of the same files changes nothing.

The token is found where the client looks for it: `HF_TOKEN`, or what `hf auth login` has stored. `HF_ENDPOINT` names
another hub.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants
from huggingface_hub import errors as hub
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from engine.errors import ConfigError, ModelError
from engine.log import get_logger
from engine.models.license import HUB_ERRORS

log = get_logger(__name__)
_STALE = ["*.safetensors", "*.json", "*.onnx", "*.onnx.data"]
"""Files of an earlier upload that go where this one has none of their name: weights must not lie beside others."""
_LOGGED_OUT, _FORBIDDEN = 401, 403


def repositories(name: str, models: Sequence[str]) -> dict[str, str]:
    """Return the repository of each model: the name as it is for a single one, else with the model's behind it.

    Args:
        name: `OWNER/NAME`.
        models: Names of models that are published.

    Raises:
        ConfigError: It is no name of a repository.
    """
    found = {model: name if len(models) == 1 else f"{name}-{model.replace('_', '-')}" for model in models}
    for repository in found.values():
        try:
            validate_repo_id(repository)
        except hub.HFValidationError as error:
            raise _no_name(name, str(error).partition(".")[0]) from error
    if name.count("/") != 1:
        raise _no_name(name, "it has no owner")
    return found


def require_hub(names: Sequence[str], *, private: bool) -> None:
    """Refuse what could not be published, before any work is done.

    Args:
        names: Repositories of one owner, `OWNER/NAME`.
        private: Whether nobody else is to see them.

    Raises:
        ConfigError: Nobody is logged in, the token is not valid or may only read, the owner is neither the user nor an
            organization of theirs, or a repository is there that others see, or do not, against what was asked for.
        ModelError: The hub does not answer.
    """
    api, owner = _api(), names[0].partition("/")[0]
    try:
        with _answering("ask who is logged in"):
            user = api.whoami()
    except hub.LocalTokenNotFoundError as error:
        raise ConfigError(
            "nobody is logged in to the hub",
            expected="a token in HF_TOKEN, or one that `hf auth login` has stored",
            remedy="run `hf auth login` with a token that may write (settings/tokens on the hub's site)",
        ) from error
    role = user.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise ConfigError(
            f"the token of {user['name']} may only read",
            expected="one that may write",
            remedy="make one on the hub's site, settings/tokens, and `hf auth login` with it",
        )
    owners = [str(user["name"]), *(str(one["name"]) for one in user.get("orgs", []))]
    if owner not in owners:
        raise ConfigError(
            f"{user['name']}, who is logged in, belongs to no organization {owner}",
            expected=f"one of {', '.join(owners)}",
            remedy=f"name --push {owners[0]}/{names[0].partition('/')[2]}, or log in as somebody who belongs to it",
        )
    for name in names:
        _require_visibility(api, name, private)


def push(folder: Path, name: str, *, private: bool) -> str:
    """Make a repository where there is none, and upload an export into it.

    Args:
        folder: The export.
        name: `OWNER/NAME`.
        private: Whether nobody else is to see it; of one that is there, nothing is changed.

    Returns:
        Its address.

    Raises:
        ConfigError: As of `require_hub`, which is to be asked before.
        ModelError: The hub does not answer, or refuses it.
    """
    api = _api()
    with _answering(f"make the repository {name}"):
        address = str(api.create_repo(name, private=private, exist_ok=True, repo_type="model"))
    _require_visibility(api, name, private)
    with _answering(f"upload {folder} to {name}"):
        commit = api.upload_folder(
            repo_id=name,
            folder_path=folder,
            repo_type="model",
            commit_message="Upload a model of Sparring",
            delete_patterns=_STALE,
        )
    log.info("%s is at %s (%s), %s", folder.name, address, commit.oid, "private" if private else "public")
    return address


def _api() -> HfApi:
    # The client itself reads the variable when it is imported, and no later.
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT") or constants.ENDPOINT, library_name="sparring")


def _require_visibility(api: HfApi, name: str, private: bool) -> None:
    try:
        with _answering(f"look at {name}"):
            found = bool(api.repo_info(name, repo_type="model").private)
    except hub.RepositoryNotFoundError:
        return
    if found != private:
        raise ConfigError(
            f"the repository {name} is there, and is {'private' if found else 'public'}",
            expected="a private one, unless --public is said" if private else "a public one, since --public is said",
            remedy=f"name another one, {'leave --public out' if found else 'say --public'}, or change the "
            "visibility of that one in its settings",
        )


@contextmanager
def _answering(what: str) -> Iterator[None]:
    """Turn what the client raises into an error that says what to do."""
    try:
        yield
    except (hub.LocalTokenNotFoundError, hub.RepositoryNotFoundError):
        raise
    except hub.HfHubHTTPError as error:
        raise _refused(what, error) from error
    except RuntimeError as error:  # of an upload in several threads
        if isinstance(error.__cause__, HUB_ERRORS):
            raise _no_answer(what, error.__cause__) from error
        raise
    except HUB_ERRORS as error:
        raise _no_answer(what, error) from error


def _refused(what: str, error: Any) -> ConfigError | ModelError:
    code = getattr(getattr(error, "response", None), "status_code", None)
    told = (getattr(error, "server_message", None) or str(error)).strip().splitlines()[0]
    if code == _LOGGED_OUT:
        return ConfigError(
            f"the hub does not accept the token with which it was asked to {what}: {told}",
            expected="a valid token in HF_TOKEN, which goes first, or one that `hf auth login` has stored",
            remedy="run `hf auth login --force`, and unset HF_TOKEN where it has an old one",
        )
    if code == _FORBIDDEN:
        return ConfigError(
            f"the hub refused to {what}: {told}",
            expected="a token whose owner may write there",
            remedy="give the token write access to that owner's repositories (settings/tokens on the hub's site), or "
            "ask the organization for the role `write`",
        )
    return ModelError(
        f"the hub failed to {what} ({code}): {told}",
        remedy="start the same command again later: what has arrived is not sent again",
    )


def _no_answer(what: str, error: BaseException) -> ModelError:
    return ModelError(
        f"there was no answer when the hub was to {what}: {str(error).strip() or type(error).__name__}",
        expected=f"a hub at {os.environ.get('HF_ENDPOINT') or constants.ENDPOINT}",
        remedy="look at the network, HF_ENDPOINT and HF_HUB_OFFLINE; start the same command again: what has arrived is "
        "not sent again",
    )


def _no_name(name: str, why: str) -> ConfigError:
    return ConfigError(
        f"--push {name!r} is no name of a repository: {why}",
        expected="OWNER/NAME, of letters, digits, '-', '_' and '.'; OWNER is you or an organization of yours",
    )
