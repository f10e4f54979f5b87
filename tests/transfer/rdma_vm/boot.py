"""`make test-rdma`: the RDMA transport over real verbs, in a virtual machine.

Boots a stock Debian kernel in qemu (no KVM, no root needed) with two `rdma_rxe` devices, lets it
run guest.py and judges the verdict that this leaves in a file: missing is failed. The kernel comes
from its Debian package, downloaded once into a folder that git ignores. Where something is
missing it says what to install, and exits with 75.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

TREE = Path(__file__).resolve().parents[3]
CACHE = TREE / ".cache" / "rdma-vm"
PYVERBS = Path("/usr/lib/python3/dist-packages/pyverbs")
SKIPPED = 75
BOOT_S_MAX = 320
MEMORY_MIB = 1024
MODULES = ("virtio_pci", "9pnet_virtio", "9p", "veth", "crc32_generic", "rdma_rxe", "sch_netem")
TOOLS = {
    "qemu-system-x86_64": "qemu-system-x86",
    "busybox": "busybox-static",
    "depmod": "kmod",
    "cpio": "cpio",
    "dpkg-deb": "dpkg",
    "rdma": "iproute2",
}
FILES = {
    PYVERBS: "python3-pyverbs",
    Path("/etc/libibverbs.d/rxe.driver"): "ibverbs-providers",
}


class Skipped(Exception):
    """The lane cannot run here; why, and what to do."""


def main(arguments: list[str]) -> int:
    """Boot, wait, judge."""
    begun = time.monotonic()
    try:
        check_tools()
        with tempfile.TemporaryDirectory(prefix="dualpath-rdma-") as folder:
            scratch = Path(folder)
            kernel, modules = kernel_of(CACHE)
            initrd = make_initrd(scratch, modules, arguments)
            out = scratch / "out"
            out.mkdir()
            boot(kernel, initrd, out)
            verdict = out / "verdict.json"
            found = json.loads(verdict.read_text()) if verdict.exists() else None
    except Skipped as reason:
        print(f"skipped: {reason}")
        return SKIPPED
    status = judge(found)
    print(f"{time.monotonic() - begun:.0f} s in all")
    return status


def judge(found: dict[str, str] | None) -> int:
    """Print the verdict and turn it into an exit status."""
    if found is None:
        print("failed: the virtual machine left no verdict (its console is above)")
        return 1
    failed = {name: said for name, said in found.items() if said != "passed"}
    for name, said in failed.items():
        print(f"FAILED {name}\n{said}\n")
    print(f"{len(found) - len(failed)} of {len(found)} checks passed over rdma_rxe")
    if "finished" not in found:
        print("failed: the checks did not come to their end")
        return 1
    return 1 if failed else 0


def check_tools() -> None:
    """Raise Skipped unless everything is installed that the lane uses."""
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    missing = [package for tool, package in TOOLS.items() if shutil.which(tool) is None]
    missing += [package for path, package in FILES.items() if not path.exists()]
    if missing:
        raise Skipped(f"not installed: apt install {' '.join(sorted(set(missing)))}")
    tag = f"cpython-{sys.version_info.major}{sys.version_info.minor}-"
    if not any(tag in each.name for each in PYVERBS.iterdir()):
        raise Skipped(
            f"{PYVERBS} is not for Python {sys.version_info.major}."
            f"{sys.version_info.minor}; make PYTHON=/usr/bin/python3"
        )


def kernel_of(cache: Path) -> tuple[Path, Path]:
    """The kernel's image, and the folder of its modules; downloaded if need be."""
    cache.mkdir(parents=True, exist_ok=True)
    kernels = sorted(cache.glob("kernel/boot/vmlinuz-*"))
    if not kernels:
        package = download_kernel(cache)
        staging = cache / "kernel.partial"
        shutil.rmtree(staging, ignore_errors=True)
        run(["dpkg-deb", "-x", str(package), str(staging)])
        version = next(staging.glob("lib/modules/*")).name
        run(["depmod", "-b", str(staging), version])
        staging.rename(cache / "kernel")
        kernels = sorted(cache.glob("kernel/boot/vmlinuz-*"))
    return kernels[0], next(cache.glob("kernel/lib/modules/*"))


def download_kernel(cache: Path) -> Path:
    """The package of Debian's current kernel."""
    if not list(cache.glob("linux-image-*.deb")):
        said = run(["apt-cache", "depends", "linux-image-amd64"], skip="no list of packages")
        found = re.search(r"Depends: (linux-image-\d\S+-amd64)", said)
        if found is None:
            raise Skipped("apt knows no kernel image; run apt update as root (Debian, amd64)")
        run(["apt-get", "download", found[1]], cwd=cache, skip="cannot download the kernel image")
    return next(cache.glob("linux-image-*.deb"))


def run(command: list[str], *, cwd: Path | None = None, skip: str = "") -> str:
    """What a command prints. If it fails: Skipped, if `skip` says so."""
    try:
        done = subprocess.run(
            command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        if skip:
            raise Skipped(f"{skip}: {error}") from error
        raise
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        message = f"{command[0]}: {said[-1] if said else done.returncode}"
        raise Skipped(f"{skip}: {message}") if skip else RuntimeError(message)
    return done.stdout


def make_initrd(scratch: Path, modules: Path, arguments: list[str]) -> Path:
    """The guest's root: busybox, init.sh, the modules, and links into /usr."""
    root = scratch / "root"
    for name in ("bin", "etc/libibverbs.d", "usr"):
        (root / name).mkdir(parents=True)
    for name in ("sbin", "lib", "lib64"):
        (root / name).symlink_to(f"usr/{name}")
    busybox = shutil.which("busybox")
    assert busybox is not None
    shutil.copy(busybox, root / "bin/busybox")
    (root / "bin/sh").symlink_to("busybox")
    for driver in Path("/etc/libibverbs.d").iterdir():
        shutil.copy(driver, root / "etc/libibverbs.d")
    # /lib is the host's once /usr is mounted, so modprobe is told of this folder instead.
    kept = root / "modules" / modules.name
    for path in needed(modules):
        (kept / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(modules / path, kept / path)
    init = (Path(__file__).parent / "init.sh").read_text()
    # Through the environment's own site hooks, so that the native parts are found as on the host.
    purelib = sysconfig.get_paths()["purelib"]
    (root / "site").mkdir()
    (root / "site/sitecustomize.py").write_text(f"import site\nsite.addsitedir({purelib!r})\n")
    folders = ["/site", "/run/pyverbs"]
    insmod = " ".join(f"/modules/{modules.name}/{path}" for path in needed(modules))
    for name, value in {
        "MODULES": insmod,
        "TREE": str(TREE),
        "PYTHON": sys.base_prefix,
        "PYTHONPATH": ":".join(folders),
        "ARGUMENTS": " ".join(arguments),
    }.items():
        init = init.replace(f"@{name}@", value)
    (root / "init").write_text(init)
    (root / "init").chmod(0o755)
    listing = "\n".join(str(each.relative_to(root)) for each in sorted(root.rglob("*")))
    initrd = scratch / "initrd"
    with initrd.open("wb") as file:
        subprocess.run(
            ["cpio", "--quiet", "-o", "-H", "newc", "-R", "0:0"],
            cwd=root,
            input=listing.encode(),
            stdout=file,
            check=True,
            timeout=60,
        )
    return initrd


def needed(modules: Path) -> list[str]:
    """The files of MODULES and of what they need, in the order in which they can be loaded."""
    depends: dict[str, list[str]] = {}
    for line in (modules / "modules.dep").read_text().splitlines():
        path, _, after = line.partition(":")
        depends[path] = after.split()
    by_name = {Path(path).name.split(".")[0].replace("-", "_"): path for path in depends}
    found: list[str] = []
    for name in MODULES:
        path = by_name[name]
        # A line of modules.dep has the nearest first; what is needed most is last.
        for each in [*reversed(depends[path]), path]:
            if each not in found:
                found.append(each)
    return found


def boot(kernel: Path, initrd: Path, out: Path) -> None:
    """Run the machine until it powers off; its console goes to stdout."""
    command = ["qemu-system-x86_64", "-M", "q35", "-cpu", "Nehalem", "-accel", "tcg"]
    command += ["-smp", "2", "-m", str(MEMORY_MIB), "-nographic", "-no-reboot", "-net", "none"]
    command += ["-kernel", str(kernel), "-initrd", str(initrd)]
    command += ["-append", "console=ttyS0 quiet panic=-1 random.trust_cpu=on"]
    shares = (
        ("usr", Path("/usr"), True),
        ("tree", TREE, True),
        ("python", Path(sys.base_prefix), True),
        ("out", out, False),
    )
    for tag, folder, read_only in shares:
        value = f"local,id={tag},path={folder},security_model=none,multidevs=remap"
        command += ["-fsdev", value + (",readonly=on" if read_only else "")]
        command += ["-device", f"virtio-9p-pci,fsdev={tag},mount_tag={tag}"]
    machine = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        machine.wait(BOOT_S_MAX)
    except subprocess.TimeoutExpired:
        print(f"the virtual machine did not end within {BOOT_S_MAX} s")
    finally:
        if machine.poll() is None:
            machine.kill()
            machine.wait(10)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
