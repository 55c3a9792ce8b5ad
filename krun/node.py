"""make(node): a device node for containers of one user namespace."""

from __future__ import annotations

import os
import stat

from krun.translate import NODES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from krun.translate import Node


def make(node: Node) -> None:
    """Make the node in a directory that its uid alone can enter; raises OSError.

    The node serves every container of that uid, so it stays; a reboot removes it.
    """
    if os.path.exists(node.path):
        return
    os.makedirs(NODES, mode=0o711, exist_ok=True)
    os.chmod(NODES, 0o711)
    directory = os.path.dirname(node.path)
    try:
        os.mkdir(directory, 0o700)
    except FileExistsError:
        pass
    os.chown(directory, node.uid, node.uid)
    mask = os.umask(0)
    try:
        device = os.makedev(node.device.major, node.device.minor)
        os.mknod(node.path, stat.S_IFCHR | 0o666, device)
    except FileExistsError:
        pass  # another create was faster
    finally:
        os.umask(mask)
