"""Downloads weights at hf://OWNER/NAME[@REVISION][/FOLDER or FILE] from the Hugging Face hub into its local cache.

Only descriptions and tensors are downloaded, never a repository's code.
"""

import re
from pathlib import Path
from urllib.parse import unquote

from jitscale.errors import CheckpointError, StorageError, UserError, first_line

# A Path turns the two slashes of an address into one.
_ADDRESS = re.compile(r"hf:/{1,2}(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^/@]+))?(?:/(?P<inside>.*))?", re.ASCII)
_FETCHED = ("*.json", "*.safetensors", "*.pth")


def is_hub_address(path: str | Path) -> bool:
    """True if `path` is an address on the Hugging Face hub."""
    return str(path).startswith("hf:/")


def fetched(address: str | Path) -> Path:
    """The path of a local copy of `address`; files in the local cache are not downloaded again.

    Raises a UserError if the address is invalid or huggingface_hub is not installed, a CheckpointError if there is no
    such repository, revision or file, a StorageError if the hub cannot be reached.
    """
    found = _ADDRESS.fullmatch(str(address))
    if found is None or ".." in str(address).split("/"):
        wanted = "hf://OWNER/NAME, hf://OWNER/NAME@REVISION or hf://OWNER/NAME/FOLDER"
        raise UserError(f"{address}: is not an address on the Hugging Face hub; write {wanted}")
    try:
        # huggingface_hub belongs to an extra.
        from huggingface_hub import errors as hub  # noqa: PLC0415
        from huggingface_hub import snapshot_download  # noqa: PLC0415
    except ImportError as error:
        raise UserError(f"{address}: needs {error.name}; pip install 'jitscale[hub]'") from error
    name, inside = found["name"], (found["inside"] or "").strip("/")
    revision = None if found["revision"] is None else unquote(found["revision"])
    where = f"hf://{name}" + (f"@{revision}" if revision else "")
    if inside.endswith((".safetensors", ".pth")):
        patterns = [inside]
    else:
        patterns = [f"{inside}/{pattern}" if inside else pattern for pattern in _FETCHED]
    try:
        path = Path(snapshot_download(name, revision=revision, allow_patterns=patterns), inside)
    except hub.GatedRepoError as error:
        what = f"{where}: requires that you accept its terms"
        raise CheckpointError(f"{what}; accept them on its page, then run hf auth login") from error
    except hub.RepositoryNotFoundError as error:
        what = f"{where}: no such repository, or a private one"
        raise CheckpointError(f"{what}; correct the address, or run hf auth login") from error
    except hub.RevisionNotFoundError as error:
        raise CheckpointError(f"{where}: the repository has no such revision; name a branch, tag or commit") from error
    except hub.LocalEntryNotFoundError as error:
        what = f"{where}: not in the local cache, and the hub cannot be reached (offline, or HF_HUB_OFFLINE is set)"
        raise StorageError(f"{what}; connect, or download it elsewhere and give the folder") from error
    except (hub.HfHubHTTPError, hub.HFValidationError, OSError) as error:
        what = f"{where}: cannot be downloaded ({first_line(error)}); correct the address, or give a downloaded folder"
        raise (StorageError.of(error, what) if isinstance(error, OSError) else CheckpointError(what)) from error
    if not path.exists():
        raise CheckpointError(f"{where}: has no {inside} with weights; look at its files on the hub")
    return path
