"""The decision: what is pulled, removed and kept, from every state an object can be in."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from krun.images import decide
from krun.images.decide import Decision, Outcome, Wish, Work, settle
from krun.images.references import Reference, parse
from krun.images.stores.model import Image

SHA = "sha256:" + "ab" * 32


def image(name: str, image_id: str = "", **more: str) -> Image:
    reference = parse(name)
    return Image(
        image_id or f"sha256:{name}",
        (reference.tagged,) if reference.tag else (),
        (f"{reference.name}@{reference.digest or SHA}",),
        (),
        100,
        **more,  # type: ignore[arg-type]
    )


def wish(key: str, *images: str, **more: object) -> Wish:
    done = {"status": "Succeeded", "reason": "ImageCacheCreate"}
    return Wish(key, tuple(map(parse, images)))._replace(**{**done, **more})


def new(key: str, *images: str) -> Wish:
    return wish(key, *images, status="", reason="")


def pulled(decision: Decision) -> set[str]:
    return {str(pull.reference) for pull in decision.pulls}


def removed(decision: Decision) -> set[str]:
    return {removal.name for removal in decision.removals}


A, B = "docker.io/library/a:1", "docker.io/library/b:1"


def test_a_new_object_pulls_only_what_is_not_there() -> None:
    decision = decide.decide([new("x", "a:1", "b:1")], [image("a:1")], {})
    assert pulled(decision) == {B}
    assert decision.works == (Work("x", decide.CREATE),)
    assert decision.removals == ()


def test_present_means_the_whole_tag() -> None:
    decision = decide.decide([new("x", "a:1")], [image("a:1.2"), image("a:11")], {})
    assert pulled(decision) == {A}


def test_nothing_to_do_decides_nothing() -> None:
    decision = decide.decide([wish("x", "a:1")], [image("a:1"), image("other:1")], {})
    assert decision == Decision((), (), (), (), (), ())


def test_one_pull_for_all_who_want_it() -> None:
    decision = decide.decide([new("x", "a:1"), new("y", "a:1")], [], {})
    assert [pull.keys for pull in decision.pulls] == [("x", "y")]


def test_an_update_removes_what_nobody_wants() -> None:
    changed = wish("x", "b:1", held=(A, B), changed=True)
    assert removed(decide.decide([changed], [image("a:1"), image("b:1")], {})) == {A}
    other = wish("y", "a:1")
    assert removed(decide.decide([changed, other], [image("a:1"), image("b:1")], {})) == set()


@pytest.mark.parametrize("how", ["purge", "deleting"])
def test_purge_and_delete_remove(how: str) -> None:
    leaving = wish("x", "a:1", "b:1", held=(A,), **{how: True})
    decision = decide.decide([leaving, wish("y", "b:1")], [image("a:1"), image("b:1")], {})
    assert removed(decision) == {A}
    assert pulled(decision) == set()


@pytest.mark.parametrize("more", [{"purge": True}, {"deleting": True}, {"changed": True}])
def test_nothing_in_use_is_removed(more: dict[str, bool]) -> None:
    wanted = () if "changed" in more else ("a:1",)
    leaving = wish("x", *wanted, held=(A,), **more)
    decision = decide.decide([leaving], [image("a:1")], {"sha256:a:1": ["web"]})
    assert decision.removals == ()
    assert decision.kept[0].containers == ("web",)


def test_what_a_person_pinned_stays() -> None:
    leaving = wish("x", "a:1", deleting=True)
    decision = decide.decide([leaving], [image("a:1", pinned="user")], {})
    assert decision.removals == ()
    assert decision.kept[0].pinned
    settled = settle(leaving, decision.works[0], {}, decision.kept, [image("a:1", pinned="user")])
    assert settled.status == decide.SUCCEEDED


def test_purged_images_stay_away_until_asked_for() -> None:
    purged = wish("x", "a:1", reason=decide.PURGE, due=True)
    assert decide.decide([purged], [], {}).works == ()
    assert pulled(decide.decide([purged._replace(refresh=True)], [], {})) == {A}
    assert pulled(decide.decide([purged._replace(changed=True)], [], {})) == {A}
    # Its wish does not hold an image that another object gives up.
    other = wish("y", deleting=True, held=(A,))
    assert removed(decide.decide([purged, other], [image("a:1")], {})) == {A}


def test_what_went_missing_comes_back() -> None:
    decision = decide.decide([wish("x", "a:1")], [], {})
    assert decision.works == (Work("x", decide.REFRESH),)
    assert pulled(decision) == {A}


def test_a_failed_object_waits_for_its_schedule() -> None:
    failed = wish("x", "a:1", status=decide.FAILED)
    assert decide.decide([failed], [], {}).works == ()
    assert pulled(decide.decide([failed._replace(due=True)], [], {})) == {A}


@pytest.mark.parametrize("status", [decide.PROCESSING, decide.ABORTED])
@pytest.mark.parametrize("reason", [decide.CREATE, decide.UPDATE, decide.REFRESH])
def test_unfinished_work_goes_on(status: str, reason: str) -> None:
    decision = decide.decide([wish("x", "a:1", status=status, reason=reason)], [], {})
    assert decision.works == (Work("x", reason),)
    assert pulled(decision) == {A}


def test_an_unfinished_purge_goes_on() -> None:
    half = wish("x", "a:1", "b:1", status=decide.PROCESSING, reason=decide.PURGE)
    assert removed(decide.decide([half], [image("b:1")], {})) == {B}


def test_a_purge_that_a_container_held_back_is_tried_again() -> None:
    held_back = wish("x", "a:1", held=(A,), status=decide.FAILED, reason=decide.PURGE)
    assert decide.decide([held_back], [image("a:1")], {"sha256:a:1": ["web"]}).removals == ()
    assert removed(decide.decide([held_back], [image("a:1")], {})) == {A}
    assert pulled(decide.decide([held_back._replace(refresh=True)], [], {})) == {A}


def test_idle_objects_do_nothing_but_want() -> None:
    idle = wish("x", "a:1", "b:1", idle=True)
    leaving = wish("y", "a:1", deleting=True)
    decision = decide.decide([idle, leaving], [image("a:1")], {})
    assert decision.pulls == decision.removals == ()


def test_latest_is_compared_at_work_only() -> None:
    present = [image("a")]
    assert decide.decide([wish("x", "a")], present, {}).pulls == ()
    [pull] = decide.decide([wish("x", "a", due=True)], present, {}).pulls
    assert pull.present == (f"docker.io/library/a@{SHA}",)
    assert decide.decide([wish("x", "a:1", due=True)], [image("a:1")], {}).pulls == ()
    assert pulled(decide.decide([wish("x", "a:1", due=True)], [image("a:1")], {}, True)) == {A}


def test_a_digest_is_the_image_with_that_digest() -> None:
    by_digest = f"a@{SHA}"
    assert decide.decide([wish("x", by_digest)], [image("a:1")], {}).works == ()
    other = f"a@sha256:{'cd' * 32}"
    assert len(decide.decide([wish("x", other)], [image("a:1")], {}).pulls) == 1
    # The same image has a tag that nobody here gave up.
    leaving = wish("x", by_digest, deleting=True)
    assert decide.decide([leaving], [image("a:1")], {}).removals == ()


def test_pins() -> None:
    present = [image("a:1"), image("b:1", pinned="cache"), image("c:1", pinned="user")]
    decision = decide.decide([wish("x", "a:1", "c:1")], present, {}, pin=True)
    assert decision.pins == ("sha256:a:1",)
    assert decision.unpins == ("sha256:b:1",)


def test_settled_failures_name_image_and_cause() -> None:
    one = new("x", "a:1", "b:1")
    outcomes = {A: Outcome(A, pulled=True), B: Outcome(B, reason="ErrImagePull", message="no")}
    settled = settle(one, Work("x", decide.CREATE), outcomes, (), [image("a:1")])
    assert settled.status == decide.FAILED
    assert settled.failures == {B: ("ErrImagePull", "no")}
    assert settled.images == ((A, SHA),)


def test_a_pull_that_left_nothing_is_a_failure() -> None:
    settled = settle(new("x", "a:1"), Work("x", decide.CREATE), {A: Outcome(A, True)}, (), [])
    assert settled.status == decide.FAILED


def test_no_image_for_this_node() -> None:
    settled = settle(new("x"), Work("x", decide.CREATE), {}, (), [])
    assert settled.status == decide.NOTHING


_NAMES = st.sampled_from(["a:1", "b:1", "c:1", "a:1.2", "d"])
_WISHES = st.lists(
    st.builds(
        lambda number, wanted, held, status, reason, flags: Wish(
            f"k{number}",
            tuple(map(parse, wanted)),
            tuple(str(parse(name)) for name in held),
            status,
            reason,
            *flags,
        ),
        st.integers(0, 9),
        st.sets(_NAMES, max_size=3),
        st.sets(_NAMES, max_size=3),
        st.sampled_from(["", "Processing", "Succeeded", "Failed", "Aborted"]),
        st.sampled_from([decide.CREATE, decide.UPDATE, decide.REFRESH, decide.PURGE]),
        st.lists(st.booleans(), min_size=6, max_size=6),
    ),
    max_size=5,
    unique_by=lambda one: one.key,
)


@given(_WISHES, st.sets(_NAMES), st.sets(_NAMES))
def test_what_holds_of_every_decision(
    wishes: list[Wish], present: set[str], used: set[str]
) -> None:
    images = [image(name) for name in sorted(present)]
    containers = {f"sha256:{name}": ["c"] for name in used}
    decision = decide.decide(wishes, images, containers)
    names = {str(parse(name)) for name in present}
    gone = removed(decision)
    assert gone <= names
    assert not gone & {str(parse(name)) for name in used}
    idle_wants: set[Reference] = set()
    for one in wishes:
        alive = not one.deleting and not one.purge and one.reason != decide.PURGE
        if alive:
            idle_wants.update(one.wanted)
    assert not gone & {str(reference) for reference in idle_wants}
    assert all(str(p.reference) not in names or p.present for p in decision.pulls)
    # Doing it leads to a state where doing it again removes and pulls nothing new.
    after = [image(name) for name in sorted(present) if str(parse(name)) not in gone]
    after += [image(str(p.reference)) for p in decision.pulls if not p.present]
    again = decide.decide(wishes, after, containers)
    assert again.removals == ()
    assert all(pull.present for pull in again.pulls)
