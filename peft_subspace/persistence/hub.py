"""Upload of an adapter with its completed model card."""

from __future__ import annotations

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError

from peft_subspace.persistence.card import LORA_FOLDER, name_repository
from peft_subspace.persistence.lora_export import export_lora


def push_to_hub(
    model: Any,
    repo_id: str,
    *,
    lora: bool = False,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload adapter",
) -> CommitInfo:
    """Upload a model's adapters in one commit, with the model card that `save_pretrained` completes.

    `model.push_to_hub` uploads the same adapters, but transformers puts a card of its own in the place of the
    completed one, unless the repository has a card already. Here such a card is completed and kept.

    Args:
        model: Model with adapters, wrapped by PEFT or with adapters added by transformers.
        repo_id: Repository, created if it does not exist.
        lora: Whether the adapter `"default"` is uploaded as a plain LoRA, too, in the folder `lora`;
            an older one is deleted in any case.
        private: Whether a new repository is private.
        token: Token with the right to write; by default the token of the logged-in user.
        revision: Branch, created if it does not exist.
        commit_message: First line of the commit's message.

    Returns:
        The Hub's information on the commit.

    Raises:
        ValueError: If `lora` is asked for and `export_lora` cannot do it. Nothing has been uploaded then.
    """
    api = HfApi(token=token)
    with TemporaryDirectory() as folder:
        if lora:
            export_lora(model, Path(folder) / LORA_FOLDER)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        try:
            card = api.hf_hub_download(repo_id, "README.md", revision=revision)
            shutil.copyfile(card, Path(folder) / "README.md")
        except (EntryNotFoundError, RevisionNotFoundError):
            pass
        model.save_pretrained(folder)
        name_repository(Path(folder), repo_id, revision)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message,
            delete_patterns=f"{LORA_FOLDER}/*",  # a LoRA of other weights, unless a new one is uploaded
        )
