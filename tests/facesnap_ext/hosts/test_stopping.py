"""How jobs stop where the page does not show exceptions: with a comment and without images."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from facesnap_ext.errors import FaceSnapError
from facesnap_ext.hosts import fork, stopping
from facesnap_ext.hosts.errors import Refusal
from facesnap_ext.hosts.job import JobState

NO_FACE = "No face was found in reference photo 1; use a photo with a face."


class Interrupted(BaseException):
    """The host's own exception for interrupted jobs."""


def use(monkeypatch: pytest.MonkeyPatch, shows_errors: bool) -> None:
    monkeypatch.setattr(fork, "current", lambda: fork.Fork("host", shows_sampling_errors=shows_errors))


def job(**values) -> SimpleNamespace:
    p = SimpleNamespace(comments=[], n_iter=3, do_not_save_samples=False, do_not_save_grid=False, is_api=False)
    p.comment = p.comments.append
    p.facesnap = JobState()
    vars(p).update(values)
    return p


@pytest.fixture
def state(monkeypatch):
    state = SimpleNamespace(interrupted=False)
    modules = {
        "modules": SimpleNamespace(shared=SimpleNamespace(state=state)),
        "modules.sd_samplers_common": SimpleNamespace(InterruptedException=Interrupted),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return state


@pytest.mark.parametrize(
    ("shows_errors", "is_api", "quiet"),
    [(True, False, False), (True, True, False), (False, True, False), (False, False, True)],
)
def test_only_a_job_whose_exception_would_be_hidden_ends_with_a_comment(
    monkeypatch, state, shows_errors, is_api, quiet
):
    use(monkeypatch, shows_errors)
    p = job(is_api=is_api, facesnap=JobState(refusal=Refusal(NO_FACE)))
    stopping.end_without_images(p)
    assert (p.comments, p.n_iter) == (([NO_FACE], 0) if quiet else ([], 3))

    p = job(is_api=is_api)
    with pytest.raises(Interrupted if quiet else FaceSnapError), stopping.shown_errors(p):
        raise FaceSnapError(NO_FACE)
    assert p.comments == ([NO_FACE] if quiet else [])
    assert state.interrupted == quiet
    assert p.do_not_save_samples == p.do_not_save_grid == quiet, "what was sampled so far is not saved"
    processed = SimpleNamespace(images=["unfinished", "grid"], infotexts=["first", "second"])
    stopping.drop_images(p, processed)
    assert processed.images == ([] if quiet else ["unfinished", "grid"])
    assert not p.do_not_save_samples, "a script may use the job again"


def test_other_jobs_keep_their_images_and_comments(monkeypatch, state):
    use(monkeypatch, False)
    p = job()
    stopping.end_without_images(p)
    with stopping.shown_errors(p):
        pass
    processed = SimpleNamespace(images=["finished"], infotexts=["first"])
    stopping.drop_images(p, processed)
    assert (p.n_iter, p.comments, processed.images) == (3, [], ["finished"])


def test_errors_of_others_are_not_touched(monkeypatch, state):
    use(monkeypatch, False)
    p = job()
    with pytest.raises(ZeroDivisionError), stopping.shown_errors(p):
        raise ZeroDivisionError
    assert not state.interrupted
