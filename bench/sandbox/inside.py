"""Started by run.py: makes the namespaces, keeps the time, runs the program in them.

Three processes: the outer one makes the namespaces; process 1 inside them builds a file system
and waits; its child gives up all rights, takes its limits and runs the program. Reads the job as
JSON from stdin and writes one JSON line with the result. Standard library only: it runs with -S.
"""

import ctypes
import json
import os
import select
import signal
import sys
import time

NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = (
    0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
)  # fmt: skip
RDONLY, NOSUID, NODEV, REMOUNT, BIND, REC, PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
PDEATHSIG, NO_NEW_PRIVS, SECCOMP = 1, 38, 22
NOBODY = 65534
ROOT = "/tmp"  # a folder that every system has; the new file system is laid over it
SYSTEM = ("/usr", "/lib", "/lib64", "/bin")
DEVICES = ("null", "zero", "urandom")
# By machine: its number for the kernel; keyctl, mmap and setsockopt; and what may not be called,
# because memory is held there that no process maps (shmget, msgget, memfd_create, memfd_secret,
# io_uring_setup) or because keys live there that are the runner's (add_key, request_key, keyctl).
MACHINES = {
    "x86_64": (0xC000003E, 250, 9, 54, (29, 68, 319, 447, 425, 248, 249, 250)),
    "aarch64": (0xC00000B7, 219, 222, 208, (194, 186, 279, 447, 425, 217, 218, 219)),
}


def libc():
    return ctypes.CDLL(None, use_errno=True)


def call(name, *args):
    """A system call by its C function; an error becomes OSError."""
    if getattr(libc(), name)(*args) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def mount(source, target, kind, flags, options=""):
    texts = [text.encode() if text else None for text in (source, target, kind)]
    call("mount", *texts, ctypes.c_ulong(flags), options.encode() or None)


def report(out, result, detail=""):
    os.write(out, (json.dumps({"result": result, "detail": detail[:1000]}) + "\n").encode())


def outer(job, out):
    """Make the namespaces; wait for their process 1."""
    spaces = NEWNS | NEWUTS | NEWIPC | NEWPID | NEWNET
    uid, gid = os.getuid(), os.getgid()
    if uid != 0:
        call("unshare", NEWUSER)
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"),
                           ("gid_map", f"{gid} {gid} 1")):  # fmt: skip
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    call("unshare", spaces)
    first = os.fork()
    if first == 0:
        call("prctl", PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        process_one(job, out, uid)
    os.waitpid(first, 0)


def process_one(job, out, uid):
    """Build the file system, start the program, keep the time; all dies with this process."""
    limits = job["limits"]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Python's own handler would let it through
    try:
        build(job["python"], limits["file_mb"])
    except OSError as error:
        report(out, "setup", str(error))
        os._exit(1)
    n_mine = count_threads(uid)
    os.chroot(ROOT)
    os.chdir("/work")
    ours, theirs = os.pipe()
    ask, answer = os.pipe()  # the word goes through it when the tests are through
    child = os.fork()
    if child == 0:
        os.close(ours)
        os.close(answer)
        os.close(out)
        try:
            give_up(limits, uid, n_mine)
            run(job, theirs, ask)
        except BaseException as error:  # whatever it is, it is the program's
            report(theirs, type(error).__name__, str(error))
        os._exit(1)
    os.close(theirs)
    os.close(ask)
    wait(child, ours, answer, out, job["word"], limits["seconds"])
    os._exit(0)


def wait(child, ours, answer, out, word, seconds):
    """Hand the word over when asked; pass the first whole line of the program's report on."""
    said, deadline, is_asked = b"", time.monotonic() + seconds, False
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            report(out, "time")
            return
        ready, _, _ = select.select([ours], [], [], left)
        if not ready:
            continue
        part = os.read(ours, 4096)
        said += part
        if not part or len(said) > 4096:
            break
        if said.startswith(b"?") and not is_asked:
            said, is_asked = said[1:], True
            os.write(answer, word.encode())
        if b"\n" in said:
            break
    line = said.partition(b"\n")[0]
    if not line:
        report(out, "exit")
    else:
        os.write(out, line[:4000] + b"\n")


def build(python, file_mb):
    """A file system in memory: read-only system folders, three devices, /work."""
    mount("none", "/", "", REC | PRIVATE)
    prefix = os.path.dirname(os.path.dirname(python))
    folders = [path for path in SYSTEM if os.path.isdir(path)]
    if not any(prefix == path or prefix.startswith(path + "/") for path in folders):
        folders.append(prefix)
    # Folders below ROOT vanish behind it: keep them open before.
    held = {path: os.open(path, os.O_PATH | os.O_DIRECTORY) for path in folders}
    devices = {name: os.open(f"/dev/{name}", os.O_PATH) for name in DEVICES}
    mount("tmpfs", ROOT, "tmpfs", NOSUID | NODEV, f"size={file_mb}m,nr_inodes=4096,mode=755")
    for path, handle in held.items():
        target = ROOT + path
        os.makedirs(target, exist_ok=True)
        mount(f"/proc/self/fd/{handle}", target, "", BIND)
        mount("none", target, "", REMOUNT | BIND | RDONLY | NOSUID | NODEV)
        os.close(handle)
    os.mkdir(ROOT + "/dev")
    for name, handle in devices.items():
        target = f"{ROOT}/dev/{name}"
        os.close(os.open(target, os.O_CREAT))
        mount(f"/proc/self/fd/{handle}", target, "", BIND)
        os.close(handle)
    os.mkdir(ROOT + "/work")
    os.chmod(ROOT + "/work", 0o777)


def count_threads(uid):
    """Threads that the program's user runs already; the system counts them with its own."""
    user, found = uid or NOBODY, 0
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                if os.stat(f"/proc/{name}").st_uid == user:
                    found += len(os.listdir(f"/proc/{name}/task"))
            except OSError:
                continue  # it has ended
    return found


def give_up(limits, uid, n_mine):
    """No rights, no output, little of everything."""
    import resource  # which Windows lacks; this file can be imported there

    os.setsid()
    null = os.open("/dev/null", os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    megabyte = 1 << 20
    most = {
        resource.RLIMIT_CPU: int(limits["seconds"]) + 1,
        resource.RLIMIT_AS: (limits["memory_mb"] + 256) * megabyte,
        resource.RLIMIT_FSIZE: limits["file_mb"] * megabyte,
        resource.RLIMIT_NPROC: n_mine + limits["processes"],
        resource.RLIMIT_NOFILE: 32,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    for name, value in most.items():
        resource.setrlimit(name, (value, value))
    if uid == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    else:
        drop_capabilities()
    call("prctl", NO_NEW_PRIVS, 1, 0, 0, 0)
    call("prctl", PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    close_doors()


def close_doors():
    """A keyring of its own, and a filter of system calls: see MACHINES.

    Shared mappings are refused too, since their pages stay when the process that filled them lets
    go, and larger buffers of sockets. Format: classic BPF over struct seccomp_data (seccomp(2)).
    """
    name = os.uname().machine
    if name not in MACHINES:
        raise OSError(f"no list of system calls for {name}")
    kernel_name, keyctl, mmap, setsockopt, refused = MACHINES[name]
    libc().syscall(keyctl, 1, None)  # KEYCTL_JOIN_SESSION_KEYRING; kernels without keys have none
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, fail, kill = 0x7FFF0000, 0x00050001, 0x80000000  # fail: with EPERM
    number, machine, third, fourth = 0, 4, 32, 40  # places in seccomp_data
    steps = [(load, 0, 0, machine), (equal, 1, 0, kernel_name), (give, 0, 0, kill)]
    steps += [(load, 0, 0, number), (at_least, 0, 1, 0x40000000), (give, 0, 0, kill)]
    for one in refused:
        steps += [(equal, 0, 1, one), (give, 0, 0, fail)]
    steps += [(equal, 0, 3, mmap), (load, 0, 0, fourth), (any_bit, 0, 1, 1), (give, 0, 0, fail)]
    steps += [(load, 0, 0, number), (equal, 0, 9, setsockopt), (load, 0, 0, third)]
    for option in (7, 8, 32, 33):  # SO_SNDBUF, SO_RCVBUF, and what root forces them with
        steps += [(equal, 0, 1, option), (give, 0, 0, fail)]
    steps += [(give, 0, 0, allow)]
    words = [code | yes << 16 | no << 24 | value << 32 for code, yes, no, value in steps]
    code = (ctypes.c_uint64 * len(words))(*words)
    call("prctl", SECCOMP, 2, (ctypes.c_uint64 * 2)(len(words), ctypes.addressof(code)), 0, 0)


def drop_capabilities():
    """Inside a user namespace its maker has every right there; none is needed."""
    for number in range(64):
        libc().prctl(24, number, 0, 0, 0)  # PR_CAPBSET_DROP; ends with an error behind the last one
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    nothing = (ctypes.c_uint32 * 6)()
    call("capset", header, nothing)


def run(job, theirs, ask):
    """The program, then its tests; only then the word is asked for."""
    # The program may change every name that it can reach; these it cannot.
    execute, write, read, leave = exec, os.write, os.read, os._exit
    dumps, compiled = json.dumps, compile(job["tests"], "tests", "exec")
    program = compile(job["program"], "program", "exec")
    space = {"__name__": "program", "__builtins__": __builtins__}
    execute(program, space)
    execute(compiled, space)
    write(theirs, b"?")
    word = read(ask, 64).decode()
    write(theirs, (dumps({"result": word}) + "\n").encode())
    leave(0)


def main():
    call("prctl", PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    job = json.loads(sys.stdin.buffer.read())
    out = os.dup(1)
    try:
        outer(job, out)
    except OSError as error:
        report(out, "setup", str(error))


if __name__ == "__main__":
    main()
