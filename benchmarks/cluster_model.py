"""What a large study costs, on paper: measured costs of one unit, and a simulation of a cluster that loses workers.

    python benchmarks/cluster_model.py measure      # of this machine, into benchmarks/cluster_model.csv
    python benchmarks/cluster_model.py simulate     # 10,000 units on 100 workers, from what was measured
    python benchmarks/cluster_model.py paper        # 1,000 defenses x 10,000 images x 20 attacks

The simulation hands units to workers as robench.runners does: one driver that takes one message at a time, a queue in
order, a lost unit put back to its front.
"""

from __future__ import annotations

import argparse
import csv
import heapq
import json
import random
import statistics
import sys
import tempfile
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

CSV = Path(__file__).with_suffix(".csv")


@dataclass
class Costs:
    """Measured seconds.

    Attributes:
        plan: of a run: load the defense, check it, make its folder.
        dispatch: of the driver, for one task handed out and taken in.
        store: of a unit: lock, write and sync its file.
        read: of a unit, when the run's figures are computed.
        start: of a worker process.
        units: recorded times of units, without their store.
    """

    plan: float
    dispatch: float
    store: float
    read: float
    start: float
    units: list[float]


def measure() -> Costs:
    """Measures all costs on this machine, on one thread."""
    import torch

    from robench import ThreatModel, load_defense
    from robench.evaluate import open_store, prepare
    from robench.plan import plan_units
    from robench.result import Evaluation
    from robench.runners import Limits, Task, run_in_processes
    from robench.runners.work import FUNCTIONS, PlanRequest, UnitRequest
    from robench.settings import Settings
    from robench.unit import run_unit

    torch.set_num_threads(1)
    settings = {"n": 512, "unit_size": 64}
    with tempfile.TemporaryDirectory() as folder:
        plans = []
        for number in range(5):
            request = PlanRequest(
                f"{folder}/{number}", "convnet(width=16)", "fashion_mnist", ("standard",), "linf", (0.1,), settings
            )
            started = time.perf_counter()
            FUNCTIONS["plan"](request, None)
            plans.append(time.perf_counter() - started)
        defense = load_defense("convnet(width=16)", "fashion_mnist")
        given = Settings(**settings, defense_spec="convnet(width=16)")  # type: ignore[arg-type]
        work = prepare(defense, "standard", ThreatModel("linf", 0.1), "fashion_mnist", given)
        store = open_store(work.spec, Path(folder) / "timed", resume=False)
        units, stores = [], []
        for unit in plan_units(work.spec):
            started = time.perf_counter()
            table = run_unit(work, unit)
            units.append(time.perf_counter() - started)
            started = time.perf_counter()
            with store.locked(shared=True):
                store.write(unit, table)
            stores.append(time.perf_counter() - started)
        started = time.perf_counter()
        Evaluation.load(store.folder).save()
        read = (time.perf_counter() - started) / len(units)
        count = 400
        missing = UnitRequest(f"{folder}/none", plan_units(work.spec)[0])
        started, first = time.perf_counter(), 0.0
        for number, _ in enumerate(
            run_in_processes(deque([Task("unit", missing)] * count), lambda _: True, workers=1, limits=Limits())
        ):
            first = first or time.perf_counter()
            last, done = time.perf_counter(), number
    dispatch = (last - first) / done
    return Costs(
        statistics.median(plans),
        dispatch,
        statistics.median(stores),
        read,
        first - started,
        [round(u, 2) for u in units],
    )


def write(costs: Costs) -> None:
    """Keeps what was measured."""
    with CSV.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["cost", "seconds", "of"])
        told = "convnet(width=16), one thread"
        writer.writerow(["plan", round(costs.plan, 4), f"one run, {told}"])
        writer.writerow(["dispatch", round(costs.dispatch, 6), "one task that fails at once, local runner, 1 worker"])
        writer.writerow(["store", round(costs.store, 5), "one unit of 64 images, 4 attacks"])
        writer.writerow(["read", round(costs.read, 5), "one unit, at the end of its run"])
        writer.writerow(["start", round(costs.start, 2), "one worker process"])
        writer.writerow(["units", json.dumps(costs.units), f"64 images under standard-1, {told}"])


def read_costs() -> Costs:
    """What was measured."""
    with CSV.open(newline="") as file:
        found = {row["cost"]: row["seconds"] for row in csv.DictReader(file)}
    units = json.loads(found.pop("units"))
    return Costs(**{key: float(value) for key, value in found.items()}, units=units)


@dataclass
class Cluster:
    """What is simulated.

    Attributes:
        workers: that work at once.
        stragglers: share of units that take ten times as long.
        mean_life_s: mean time until a worker is lost.
        runs: that the units belong to.
    """

    workers: int
    stragglers: float = 0.01
    mean_life_s: float = 4 * 3600.0
    runs: int = 100


def simulate(costs: Costs, cluster: Cluster, units: int, seed: int = 0) -> dict[str, float]:
    """Runs a cluster's day: every unit done once, whatever was lost on the way.

    Returns:
        Seconds of work (each unit once), of planning and storing, lost with workers, idle at the end, and makespan.
    """
    chance = random.Random(seed)
    queue = deque(
        chance.choice(costs.units) * (10 if chance.random() < cluster.stragglers else 1) for _ in range(units)
    )
    work, lost, losses, busy_driver = sum(queue), 0.0, 0, 0.0
    planned = cluster.runs * costs.plan / cluster.workers
    events: list[tuple[float, int]] = []
    life = [planned + costs.start + chance.expovariate(1 / cluster.mean_life_s) for _ in range(cluster.workers)]
    free = [planned + costs.start] * cluster.workers
    for worker in range(cluster.workers):
        heapq.heappush(events, (free[worker], worker))
    finished, end = 0, 0.0
    while finished < units and events:
        now, worker = heapq.heappop(events)
        if not queue:
            end = max(end, now)
            continue
        busy_driver = max(busy_driver, now) + costs.dispatch
        seconds = queue.popleft()
        until = busy_driver + seconds + costs.store
        if until > life[worker]:
            queue.appendleft(seconds)
            lost += max(life[worker] - busy_driver, 0.0)
            losses += 1
            back = max(life[worker], busy_driver) + costs.start
            life[worker] = back + chance.expovariate(1 / cluster.mean_life_s)
            heapq.heappush(events, (back, worker))
            continue
        finished, end = finished + 1, max(end, until)
        heapq.heappush(events, (until, worker))
    end += units * costs.read
    own = cluster.runs * costs.plan + units * (costs.store + costs.dispatch + costs.read)
    return {
        "units": units,
        "workers": cluster.workers,
        "work_h": work / 3600,
        "overhead_percent": 100 * own / work,
        "lost_percent": 100 * lost / work,
        "workers_lost": losses,
        "makespan_h": end / 3600,
        "efficiency_percent": 100 * work / (end * cluster.workers),
    }


def main() -> None:
    """Measures, simulates or calculates."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["measure", "simulate", "paper"])
    parser.add_argument("--workers", type=int, nargs="*", default=[10, 100, 1000])
    given = parser.parse_args()
    if given.part == "measure":
        costs = measure()
        write(costs)
        print(costs)
        return
    costs = read_costs()
    if given.part == "simulate":
        for workers in given.workers:
            found = simulate(costs, Cluster(workers), 10_000)
            print(", ".join(f"{key} {value:.4g}" for key, value in found.items()))
        return
    mean = statistics.mean(costs.units)
    attack = mean / 64 / 4
    units, work = 1000 * (10_000 // 64 + 1), 1000 * 10_000 * 20 * attack
    own = 1000 * costs.plan + units * (costs.store + costs.dispatch + costs.read)
    print(
        f"{attack:.4f} s for one image and attack; "
        f"{work / 3600:.0f} core hours in {units} units of {work / units:.0f} s"
    )
    print(f"planning and storing: {own / 3600:.1f} h, {100 * own / work:.3f} % of the work")
    print(f"driver: {units * costs.dispatch:.0f} s, so {1 / costs.dispatch:.0f} units a second at most")


if __name__ == "__main__":
    sys.exit(main())
