//! seccomp: the system calls of a daemon at work. It starts no program, makes no memory executable, and traces, mounts and loads nothing.

use std::collections::BTreeMap;

use nix::{errno::Errno, libc, unistd::getpid};
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, apply_filter,
};

use super::{Sandbox, SandboxError};

/// Whatever their arguments are: of the Rust runtime and glibc, of the queues, and of the files and sockets that Landlock is about.
const FREE: &[libc::c_long] = &[
    // Waiting, clocks, threads.
    libc::SYS_clock_getres,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_wait,
    libc::SYS_eventfd2,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_get_robust_list,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_gettimeofday,
    libc::SYS_membarrier,
    libc::SYS_nanosleep,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_set_robust_list,
    libc::SYS_sigaltstack,
    libc::SYS_signalfd4,
    libc::SYS_time,
    // What the runtime asks about itself.
    libc::SYS_getcwd,
    libc::SYS_getegid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getrandom,
    libc::SYS_getuid,
    libc::SYS_sysinfo,
    libc::SYS_uname,
    // Memory.
    libc::SYS_brk,
    libc::SYS_madvise,
    libc::SYS_mremap,
    libc::SYS_munmap,
    // The queues.
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_io_uring_setup,
    // Files.
    libc::SYS_close,
    libc::SYS_close_range,
    libc::SYS_dup,
    libc::SYS_dup2,
    libc::SYS_dup3,
    libc::SYS_fallocate,
    libc::SYS_fcntl,
    libc::SYS_fdatasync,
    libc::SYS_fstat,
    libc::SYS_fsync,
    libc::SYS_ftruncate,
    libc::SYS_lseek,
    libc::SYS_lstat,
    libc::SYS_memfd_create,
    libc::SYS_newfstatat,
    libc::SYS_open,
    libc::SYS_openat,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_preadv2,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_pwritev2,
    libc::SYS_read,
    libc::SYS_readlink,
    libc::SYS_readlinkat,
    libc::SYS_readv,
    libc::SYS_rename,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_stat,
    libc::SYS_statx,
    libc::SYS_unlink,
    libc::SYS_unlinkat,
    libc::SYS_write,
    libc::SYS_writev,
    // Sockets of the families below.
    libc::SYS_accept4,
    libc::SYS_bind,
    libc::SYS_connect,
    libc::SYS_getpeername,
    libc::SYS_getsockname,
    libc::SYS_getsockopt,
    libc::SYS_listen,
    libc::SYS_recvfrom,
    libc::SYS_recvmmsg,
    libc::SYS_recvmsg,
    libc::SYS_sendmmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
];

/// ioctl(2)s of std on its sockets and files.
const IOCTLS: &[u64] = &[libc::FIONBIO, libc::FIOCLEX];
/// Those on TAPs and on what tells about interfaces (linux/sockios.h: SIOCETHTOOL).
const NETWORK_IOCTLS: &[u64] = &[
    libc::TUNGETFEATURES,
    libc::TUNGETIFF,
    libc::TUNSETIFF,
    libc::TUNSETOFFLOAD,
    libc::TUNSETQUEUE,
    libc::TUNSETVNETHDRSZ,
    libc::SIOCGIFFLAGS,
    libc::SIOCGIFHWADDR,
    libc::SIOCGIFINDEX,
    libc::SIOCGIFMTU,
    0x8946,
];
/// prctl(2) that names mappings (linux/prctl.h: PR_SET_VMA), as glibc does on request.
const PR_SET_VMA: u64 = 0x5356_4d41;

/// Confines this thread, and those it starts. A call that is not allowed is SIGSYS.
pub(super) fn confine(sandbox: &Sandbox) -> Result<(), SandboxError> {
    // clone3 has its flags in memory, where no filter can read them: glibc takes clone where it is not there.
    let missing = SeccompAction::Errno(Errno::ENOSYS as u32);
    let clone3 = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
    apply_filter(&program(clone3, SeccompAction::Allow, missing)?)?;
    let allowed = allowed(sandbox)?;
    apply_filter(&program(allowed, SeccompAction::Trap, SeccompAction::Allow)?)?;
    Ok(())
}

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

fn program(rules: Rules, others: SeccompAction, these: SeccompAction) -> Result<BpfProgram, BackendError> {
    let target = TargetArch::try_from(std::env::consts::ARCH)?;
    SeccompFilter::new(rules, others, these, target)?.try_into()
}

/// A call whose argument `index`, as far as `mask` goes, is one of `values`.
fn only(index: u8, mask: u64, values: &[u64]) -> Result<Vec<SeccompRule>, BackendError> {
    let one = |value: &u64| {
        let is_it = SeccompCmpOp::MaskedEq(mask);
        let condition = SeccompCondition::new(index, SeccompCmpArgLen::Qword, is_it, *value)?;
        SeccompRule::new(vec![condition])
    };
    values.iter().map(one).collect()
}

fn allowed(sandbox: &Sandbox) -> Result<Rules, BackendError> {
    const WORD: u64 = u32::MAX as u64;
    let mut families = vec![libc::AF_UNIX as u64];
    let mut ioctls = IOCTLS.to_vec();
    if sandbox.network {
        families.push(libc::AF_PACKET as u64);
        ioctls.extend(NETWORK_IOCTLS);
    }
    let mut rules: Rules = FREE.iter().map(|call| (*call, Vec::new())).collect();
    let threads = libc::CLONE_THREAD as u64;
    let never_executable = only(2, libc::PROT_EXEC as u64, &[0])?;
    let this_process = only(0, WORD, &[getpid().as_raw() as u64])?;
    rules.extend([
        (libc::SYS_clone, only(0, threads, &[threads])?),
        (libc::SYS_clone3, Vec::new()),
        (libc::SYS_ioctl, only(1, WORD, &ioctls)?),
        (libc::SYS_mmap, never_executable.clone()),
        (libc::SYS_mprotect, never_executable),
        (libc::SYS_prctl, only(0, WORD, &[libc::PR_SET_NAME as u64, PR_SET_VMA])?),
        // Only asked for: where the stack ends.
        (libc::SYS_prlimit64, only(2, u64::MAX, &[0])?),
        (libc::SYS_socket, only(0, WORD, &families)?),
        (libc::SYS_tgkill, this_process),
    ]);
    Ok(rules)
}
