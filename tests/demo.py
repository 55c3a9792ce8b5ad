"""make demo: run one payload natively and once in a VM through krun, and show the difference."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from km import build

from krun import jsontext

ROOT = Path(__file__).resolve().parent.parent


def krun(*words: str) -> subprocess.CompletedProcess[str]:
    """Run krun from this checkout."""
    command = [sys.executable, "-m", "krun", *words]
    return subprocess.run(command, cwd=ROOT, text=True, capture_output=True)


def main() -> int:
    """Show where a payload runs."""
    print("krun check:")
    check = krun("check")
    print(check.stdout or check.stderr)
    with tempfile.TemporaryDirectory(prefix="krun-demo-") as name:
        bundle = Path(name)
        rootfs = bundle / "rootfs"
        rootfs.mkdir()
        payload = build.payload(rootfs)
        user = ("--rootless",) if os.geteuid() != 0 else ()
        made = krun("spec", *user, "--bundle", str(bundle))
        if made.returncode:
            print(made.stderr, file=sys.stderr)
            return 1
        config = bundle / "config.json"
        document = jsontext.loads(config.read_text())
        document["process"]["args"] = ["/payload", "uname"]
        document["process"]["terminal"] = False
        config.write_text(jsontext.dumps(document, indent="  "))
        print("the program, started by this shell:")
        print("   ", subprocess.run([payload, "uname"], text=True, capture_output=True).stdout)
        print("the same program, started by krun:")
        done = krun(
            "--root", f"{name}/state", "run", "--bundle", str(bundle), f"demo-{os.getpid()}"
        )
        print("   ", done.stdout)
        if done.returncode:
            print(done.stderr, file=sys.stderr)
            if not os.access("/dev/kvm", os.R_OK | os.W_OK):
                print("this user cannot open /dev/kvm: see krun check above", file=sys.stderr)
            return done.returncode
        in_vm = ".kontain." in done.stdout
        print("it ran in a VM: its kernel release ends in .kontain.KVM" if in_vm else "NOT in a VM")
        return 0 if in_vm else 1


if __name__ == "__main__":
    sys.exit(main())
