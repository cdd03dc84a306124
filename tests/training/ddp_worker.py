"""One process of a two-process training on the CPU; run by run_workers of conftest.py."""

import importlib.util
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

HERE = Path(__file__).parent


def steps(rank: int, world: int, folder: Path, kind: str) -> None:
    """A few steps of a method on fixed batches, of which each process has its share.

    Of a kind that ends in "_missing" one labelled and another unlabelled patch lack a modality.
    """
    from nnunetv2_semi.methods import synfoc
    from nnunetv2_semi.methods.base import Batch
    from nnunetv2_semi.methods.fusion import Fusion, FusionSettings
    from nnunetv2_semi.methods.mean_teacher import MeanTeacher, MeanTeacherSettings
    from nnunetv2_semi.methods.mix import Mix, MixSettings
    from nnunetv2_semi.methods.rcps import RCPS, RCPSSettings
    from nnunetv2_semi.methods.semi_cml import SemiCML, SemiCMLSettings
    from nnunetv2_semi.networks.fused_network import FusedNetwork
    from nnunetv2_semi.networks.modality_branches import ModalityBranches
    from nnunetv2_semi.training.step import TrainingStep

    small = conftest_of(HERE.parent / "methods")
    context, random_batch, small_network = small.context, small.random_batch, small.small_network
    # each process draws its own views
    as_it_is = {"cutmix": 0.0, "view_noise": 0.0, "view_scale": 0.0, "view_shift": 0.0, "view_gamma": 0.0}
    torch.manual_seed(1)
    kind, missing, _ = kind.partition("_missing")
    if kind == "SemiCML":
        names = {"m0": [0], "m1": [1]}
        student = ModalityBranches({n: small_network(1, 3) for n in names}, names, False)
        method = SemiCML(student, SemiCMLSettings(modalities=names, asc=False, prel_noise=0.0), context())
    elif kind == "RCPS":
        method = RCPS(small_network(2, 3), RCPSSettings(num_negatives=9, negatives_from_all_processes=True, **as_it_is),
                      context())
    elif kind in ("Mix", "batch_dice"):  # of chosen voxels each process takes the mean of its own
        own = context() if kind == "Mix" else small.with_batch_dice(context(), world > 1)
        method = Mix(small_network(2, 3), MixSettings(voxels="all", labelled_mixing=0.0, **as_it_is), own)
    elif kind == "Fusion":
        names = {"m0": [0], "m1": [1]}
        student = FusedNetwork({n: small_network(1, 3) for n in names}, names, [2], 2, 0.0)
        method = Fusion(student, FusionSettings(threshold=0.0, threshold_warmup=None, uncertainty_passes=0,
                                                disagreement_factor=1.0, **as_it_is), context())
    elif kind == "SynFoC":
        synfoc.build_foundation = lambda settings, *sizes: module_of(HERE.parent / "methods" / "test_synfoc.py") \
            .Halved(*sizes)
        method = synfoc.SynFoC(small_network(2, 3), synfoc.SynFoCSettings(
            weights="random", foundation="nnunet", confidence=0.0, smallest_box=0.0, largest_box=0.0, view_noise=0.0,
            view_scale=0.0, view_shift=0.0, view_gamma=0.0), context())
    else:
        method = MeanTeacher(small_network(2, 3), MeanTeacherSettings(perturbation="noise", noise=0.0), context())
    step = TrainingStep(method, method.optimizers(1e-2, 0.0, 10), None, torch.device("cpu"), seed=0, rank=rank,
                        max_skipped_steps=5)
    skipped = []
    for number, progress in enumerate((0.1, 0.5, 0.7, 0.99)):
        batch = random_batch(seed=number)
        if kind == "nan" and number == 1 and rank == world - 1:
            batch.unlabelled[-1].fill_(float("nan"))
        share = slice(rank * 2 // world, (rank + 1) * 2 // world)
        present = [torch.tensor(rows)[share] for rows in ([[True, True], [True, False]], [[False, True], [True, True]])]
        own = Batch(batch.labelled[share], batch.target[share], batch.unlabelled[share], *(present if missing else []))
        _, values = step.run(own, number, progress)
        skipped.append(values["skipped_steps"])
    method.after_epoch()
    torch.save({"state": method.state_dict(), "skipped": skipped}, folder / f"{kind}{missing}_{world}_{rank}.pt")


def uneven(rank: int, world: int, folder: Path, kind: str) -> None:
    """nnU-Net's Dice of a batch, of which the first process has two patches and the second one."""
    from nnunetv2_semi import compat
    from nnunetv2_semi.losses.weighted_dice_ce import WeightedDiceCE

    compat.let_processes_differ_in_patches()
    torch.manual_seed(3)
    logits, labels, weight = torch.randn(3, 3, 6, 5), torch.randint(3, (3, 1, 6, 5)), torch.rand(3, 1, 6, 5)
    own = slice(None) if world == 1 else (slice(2), slice(2, 3))[rank]
    leaf = logits[own].clone().requires_grad_()
    loss = WeightedDiceCE(False, (1.0,), True, ddp=world > 1).dice(leaf, labels[own], loss_mask=weight[own])
    loss.backward()
    # the gradient is summed over processes, and a step takes the mean over them
    torch.save({"value": loss.detach(), "gradient": leaf.grad / world}, folder / f"{kind}_{world}_{rank}.pt")


def absent(rank: int, world: int, folder: Path, kind: str) -> None:
    """nnU-Net's loss with its Dice of a batch, where the second process has no patch that counts."""
    from nnunetv2_semi import compat
    from nnunetv2_semi.methods.base import Method
    from nnunetv2_semi.methods.settings import Settings

    compat.let_processes_differ_in_patches()
    small = conftest_of(HERE.parent / "methods")
    torch.manual_seed(4)
    method = Method(small.small_network(2, 3), Settings(), small.with_batch_dice(small.context(), world > 1))
    batch = small.random_batch(count=1, seed=rank)
    term = method.supervised(method.student(batch.labelled), batch.target, patches=1 - rank)
    (term.patches * term.value).backward()
    gradient = torch.cat([p.grad.flatten() for p in method.student.parameters() if p.grad is not None])
    torch.save({"value": term.value.detach(), "gradient": gradient}, folder / f"{kind}_{world}_{rank}.pt")


def patience(rank: int, world: int, folder: Path, kind: str) -> None:
    """The first process works for longer than the others wait in nnU-Net's group of processes."""
    from nnunetv2_semi.distributed import on_first_process

    dist.destroy_process_group()
    dist.init_process_group("gloo", init_method=f"file://{folder}/{kind}", rank=rank, world_size=world,
                            timeout=timedelta(seconds=5))
    result = on_first_process(lambda: time.sleep(8) or "done")
    torch.save(result, folder / f"{kind}_{world}_{rank}.pt")


def training(rank: int, world: int, folder: Path, kind: str) -> None:
    """A whole training of a trainer on the phantom whose folders the environment names."""
    trainer = conftest_of(HERE).make_trainer(folder / "w", f"nnUNetTrainerSemi{kind}")
    trainer.run_training()
    torch.save({"state": trainer.method.state_dict(), "batch": trainer.batch_size, "foreground": trainer.foreground},
               folder / f"run_{kind}_{rank}.pt")


def conftest_of(folder: Path):
    """The conftest module of a folder."""
    return module_of(folder / "conftest.py")


def module_of(file: Path):
    """What a file holds."""
    spec = importlib.util.spec_from_file_location(f"{file.stem}_of_{file.parent.name}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    works, rank, world, folder = sys.argv[1].split(","), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world,
                                timeout=timedelta(minutes=4))
    for work in works:
        what, kind = work.split(":")
        functions = {"steps": steps, "uneven": uneven, "absent": absent, "training": training, "patience": patience}
        functions[what](rank, world, folder, kind)
    if world > 1:
        dist.destroy_process_group()
