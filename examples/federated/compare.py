"""Compare what federations send and learn: LoRA-SB, LoRA, all weights; or sequences of tasks.

    python examples/federated/compare.py
    python examples/federated/compare.py --methods keep-lora lora --tasks "business,sports;politics,tech"
    python examples/federated/compare.py --data rows.csv --model FacebookAI/roberta-base

Flower simulates the clients on this machine; `pip install "flwr[simulation]"`. MiniLM and BBC News come out
of packages (examples/data-packages.txt): no network, some minutes per method on two CPU cores.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # the app, which `flwr run` packs by itself

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation
from subspace_federation import client_app, server_app, task
from subspace_federation.task import Settings

parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
parser.add_argument("--methods", nargs="+", default=["lora-sb", "lora"], choices=task.RATES, help="in turn")
parser.add_argument("--clients", type=int, default=4, help="number of clients")
parser.add_argument("--model", default="packaged", help="encoder of the Hub, or folder")
parser.add_argument("--data", default="packaged", help="CSV file with columns text and label, one for all")
parser.add_argument("--tasks", default="all", help="labels of each task, as A,B;C,D")
parser.add_argument("--rank", type=int, default=16, help="rank of adapters")
parser.add_argument("--rounds", type=int, default=5, help="rounds of each task")
parser.add_argument("--rows", type=int, default=800, help="rows to train on, of all clients together")
parser.add_argument("--skew", type=float, default=0.5, help="how evenly classes are dealt out: low is uneven")
parser.add_argument("--length", type=int, default=64, help="most tokens of a row")
parser.add_argument("--together", action="store_true", help="also train on all rows without clients")
options = vars(parser.parse_args())
methods, clients, together = (options.pop(name) for name in ("methods", "clients", "together"))
application = ServerApp()


def without_clients(settings: Settings) -> float:
    """Accuracy on the first task of a model that is trained on the rows of all clients at once."""
    labels = task.tasks_of(settings)[0]
    train, test = task.rows_of(settings, labels)
    model = task.model_for(settings, len(labels))
    task.fit(model, train, settings, settings.rounds * settings.epochs, settings.seed)
    return task.accuracy(model, test, settings)


@application.main()
def main(grid: Grid, context: Context) -> None:
    """One federation after the other, with the same clients."""
    lines = ["method     accuracy forgotten    MB start   MB rounds  MB moments" + "  no clients" * together]
    for method in methods:
        settings = Settings(method=method, **options)
        found = server_app.federate(grid, settings)
        last, first = found.accuracies[-1], [row[-1] for row in found.accuracies]
        forgotten = sum(a - b for a, b in zip(first, last, strict=True)) / max(len(last) - 1, 1)
        row = f"{method:10} {sum(last) / len(last):8.3f} {forgotten:9.3f}" + "".join(
            f"{found.sent[kind] / 1e6:12.3f}" for kind in ("start", "rounds", "moments")
        )
        lines.append(row + (f"{without_clients(settings):12.3f}" if together else ""))
        print(*lines, sep="\n", flush=True)


run_simulation(
    application,
    client_app.app,
    num_supernodes=clients,
    backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
)
