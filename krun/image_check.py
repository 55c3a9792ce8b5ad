"""Ask the image check before crun builds a container: crun tells its caller nothing of a hook."""

from __future__ import annotations

from krun import hooks, log

TYPE_CHECKING = False
if TYPE_CHECKING:
    from krun.types import Spec

PROGRAM = "krun-image-check"


def attend(spec: Spec, container: str, bundle: str) -> Spec:
    """Run the check that translate put among the createRuntime hooks; return spec without it.

    There is no process yet: the state says "creating" and has pid 0.  Raises HookFailed with the
    check's own words where it refuses.
    """
    every = spec.get("hooks") or {}
    creating = every.get("createRuntime") or []
    checks = [hook for hook in creating if (hook.get("args") or [""])[0] == PROGRAM]
    if not checks:
        return spec
    state = {
        "ociVersion": spec.get("ociVersion", ""),
        "id": container,
        "status": "creating",
        "pid": 0,
        "bundle": bundle,
        "annotations": spec.get("annotations") or {},
    }
    said = hooks.run_hooks("createRuntime", checks, state, hooks.Outputs())
    if said:
        log.warning(said)
    rest = [hook for hook in creating if hook not in checks]
    return {**spec, "hooks": {**every, "createRuntime": rest}}
