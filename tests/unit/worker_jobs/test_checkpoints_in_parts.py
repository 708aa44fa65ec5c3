"""Which checkpoint tasks go on from, of all whose parts are here and there."""

from penstock_worker.domain.checkpoint import Choice, Writing, newest

OLD, NEW = Writing(10, "a", 2), Writing(20, "a", 2)


def test_the_newest_counts_of_which_all_parts_are_somewhere() -> None:
    held = [{(OLD, 0), (NEW, 0)}, {(OLD, 1)}]
    assert newest(held) == Choice(OLD, (0, 1))
    assert newest([held[0], {(NEW, 1)}]) == Choice(NEW, (0, 1))


def test_a_part_that_no_node_has_comes_from_the_registry() -> None:
    held = [{(NEW, 0)}]
    assert newest(held) is None
    assert newest(held, {(NEW, 1), (OLD, 0), (OLD, 1)}) == Choice(NEW, (0, -1))


def test_parts_of_different_writings_of_one_step_never_go_together() -> None:
    again = Writing(20, "b", 2)
    assert newest([{(NEW, 0)}, {(again, 1)}]) is None
    assert newest([{(NEW, 0)}, {(again, 1)}], {(again, 0)}) == Choice(again, (-1, 1))
    assert newest([{(NEW, 0), (again, 0)}, {(again, 1)}], {(NEW, 1)}) == Choice(again, (0, 1))


def test_tasks_may_have_other_numbers_and_be_fewer_than_those_that_wrote() -> None:
    three = Writing(30, "a", 3)
    assert newest([{(three, 2)}, {(three, 0), (three, 1)}]) == Choice(three, (1, 1, 0))


def test_what_is_on_a_disk_is_not_fetched() -> None:
    alone = Writing(5, "", 1)
    assert newest([{(alone, 0)}], {(alone, 0)}) == Choice(alone, (0,))
    assert newest([set()], {(alone, 0)}) == Choice(alone, (-1,))
    assert newest([set()]) is None
