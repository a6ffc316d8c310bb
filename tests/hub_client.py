"""What a user does with the Hub, done by the real client with the stand-in; test_hub.py looks at the results.

A process of its own, because huggingface_hub reads the address of the Hub when it is imported.
"""

from __future__ import annotations

import multiprocessing
import os
import sys

from hub_server import TOKEN, Hub


def outcome(job):
    """What a job returns, or its error as text."""
    try:
        return job()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def main(results_path: str, home: str, names: list[str]) -> None:
    with Hub().running() as hub:
        os.environ.update(
            HF_ENDPOINT=hub.url, HF_HOME=home, HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_TELEMETRY="1",
            HF_HUB_OFFLINE="0", TRANSFORMERS_OFFLINE="0", HF_HUB_DISABLE_PROGRESS_BARS="1",
            NO_PROXY="127.0.0.1",
        )  # fmt: skip
        import torch

        from methods import METHODS

        torch.set_num_threads(1)
        methods = [method for method in METHODS if method.name in names]
        torch.save({method.name: run(hub, method) for method in methods}, results_path)


def run(hub, method) -> dict[str, object]:
    """All that test_hub.py asks about one method."""
    from huggingface_hub import HfApi

    name = method.name.replace("_", "-")
    public, private, own = f"user/{name}", f"user/{name}-private", f"user/{name}-own"
    first, second = adapted(method, 3), adapted(method, 4)
    done: dict[str, object] = {"outputs": [logits(first), logits(second)]}

    commits = [model.push_to_hub(public, token=TOKEN).oid for model in (first, second)]
    done["files"] = sorted(hub.repositories[public].files("main"))
    done["loaded"] = {
        f"{loader}-{revision}": outcome(lambda load=load, at=at: logits(load(public, revision=at)))
        for loader, load in LOADERS.items()
        for revision, at in (("newest", None), ("first", commits[0]), ("second", commits[1]))
    }
    done["unknown revision"] = {
        loader: outcome(lambda load=load: load(public, revision="never")) for loader, load in LOADERS.items()
    }
    done["merged"] = outcome(lambda: merged([public, second], second))
    done["cosines"] = [outcome(lambda at=at: cosine(public, at)) for at in commits]
    first.push_to_hub(private, private=True, token=TOKEN)
    done["private"] = {
        f"{loader}-{kind}": outcome(lambda load=load, token=token: logits(load(private, token=token)))
        for kind, token in (("none", False), ("wrong", "hf_other"), ("right", TOKEN))
        for loader, load in LOADERS.items()
    }
    done["upload without token"] = outcome(lambda: first.push_to_hub(f"user/{name}-b", token=False))
    done["interrupted"] = interrupted(hub, adapted(method, 5), public, f"user/{name}-new")
    done["cards"] = cards(hub, first, own, public)
    hub.cuts = 1
    done["cut"] = outcome(lambda: logits(peft_subspace_load(own)))
    done["cuts left"] = hub.cuts
    done["listed"] = sorted(HfApi().list_repo_files(own))
    return done


def interrupted(hub, model, *repositories) -> dict[str, object]:
    """Kill the sender halfway through its upload of the weights; what loads after that."""
    found: dict[str, object] = {}
    for kind, repository in zip(("old", "new"), repositories, strict=True):
        hub.stalls = True
        hub.stalled.clear()
        fork = multiprocessing.get_context("fork")
        sender = fork.Process(target=model.push_to_hub, args=(repository,), kwargs={"token": TOKEN})
        sender.start()
        found[f"{kind} stalled"] = hub.stalled.wait(timeout=60)
        sender.kill()
        sender.join()
        hub.stalls = False
        for loader, load in LOADERS.items():
            found[f"{kind} {loader}"] = outcome(lambda load=load, name=repository: logits(load(name)))
    return found


def cards(hub, model, repository, pushed_by_transformers) -> dict[str, object]:
    """README of uploads by this package, with an edit between them, and by `model.push_to_hub`."""
    import peft_subspace

    def card(name: str) -> str:
        return hub.repositories[name].files("main")["README.md"].decode()

    peft_subspace.push_to_hub(model, repository, lora=True, token=TOKEN)
    found = {"first": card(repository)}
    edited = found["first"].replace("# Model Card for", "OWN WORDS\n\n# Model Card for").encode()
    files = hub.repositories[repository].files("main")
    found["lora"] = "lora/adapter_model.safetensors" in files
    hub.repositories[repository].commit("main", {**files, "README.md": edited})
    peft_subspace.push_to_hub(model, repository, token=TOKEN, revision="main")
    found["second"] = card(repository)
    model.push_to_hub(repository, token=TOKEN)
    found["third"] = card(repository)
    found["transformers"] = card(pushed_by_transformers)
    return found


def merged(sources, model):
    """By how much the sum of two sources, of which one is read from the Hub, is twice one of them."""
    from models import llama
    from peft_subspace import merging

    twice = merging.merge(sources, base=llama()).update("model.layers.0.self_attn.q_proj")
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    return (twice - 2 * layer.get_delta_weight("default")).norm() / twice.norm()


def cosine(repository, revision):
    """Cosine between one revision of an adapter and its newest."""
    from models import llama
    from peft_subspace import inspect

    found = inspect(repository, repository, base=llama(), revision=revision).overlaps
    return found["model.layers.0.self_attn.q_proj"].cosine


def adapted(method, seed: int):
    import torch
    from peft import get_peft_model

    from models import llama

    torch.manual_seed(seed)
    config = method.config(target_modules=["q_proj", "v_proj"], init_weights=False, seed=seed)
    return get_peft_model(llama(), config).eval()


def logits(model):
    import torch

    with torch.no_grad():
        return model.eval()(torch.arange(3, 11).reshape(2, 4)).logits


def peft_load(repository, **options):
    from peft import PeftModel

    from models import llama

    return PeftModel.from_pretrained(llama(), repository, **options)


def peft_subspace_load(repository, **options):
    import peft_subspace
    from models import llama

    return peft_subspace.load(llama(), repository, **options)


LOADERS = {"peft": peft_load, "own": peft_subspace_load}

if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
