import torch
from torch import nn

from nnunetv2_semi.teachers import EMATeacher


def network():
    return nn.Sequential(nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.Dropout2d(0.5), nn.Conv2d(16, 2, 1))


def test_follows_the_warmed_up_average_of_every_weight_and_running_statistic():
    student = network()
    teacher = EMATeacher(student, 0.9)
    expected = {k: v.clone().double() for k, v in student.state_dict().items()}
    for update in range(15):
        with torch.no_grad():
            for p in student.parameters():
                p.add_(torch.randn_like(p))
        student(torch.randn(2, 1, 8, 8))
        teacher.update()
        decay = min(1 - 1 / (update + 1), 0.9)
        for key, value in student.state_dict().items():
            expected[key] = decay * expected[key] + (1 - decay) * value if value.is_floating_point() else value
    for key, value in teacher.network.state_dict().items():
        assert torch.allclose(value.double(), expected[key].double(), atol=1e-5), key
    assert int(teacher.network[1].num_batches_tracked) == 15


def test_first_update_copies_the_student():
    student = network()
    teacher = EMATeacher(student)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(1)
    teacher.update()
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), teacher.network.parameters(), strict=True))


def test_stays_in_evaluation_mode_and_out_of_the_graph():
    teacher = EMATeacher(network())
    nn.ModuleList([teacher]).train()
    assert not any(m.training for m in teacher.modules())
    assert not teacher(torch.randn(1, 1, 8, 8, requires_grad=True)).requires_grad
    assert not any(p.requires_grad for p in teacher.parameters())


def test_the_student_does_not_change_with_the_teacher():
    student = network()
    teacher = EMATeacher(student)
    before = [p.clone() for p in student.parameters()]
    with torch.no_grad():
        for p in teacher.network.parameters():
            p.add_(1)
    teacher.blend_in(0.5)
    assert all(torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=True))


def test_the_number_of_updates_is_saved():
    student = network()
    teacher, restored = EMATeacher(student), EMATeacher(student)
    for _ in range(4):
        teacher.update()
    restored.load_state_dict(teacher.state_dict())
    assert restored.updates == 4
    restored.reset()
    assert restored.updates == 0
