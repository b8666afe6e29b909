//! The sandbox, from inside: each case is a process of its own, which does something once it is confined.

use std::{
    fs::{self, File},
    io::ErrorKind::PermissionDenied,
    net::TcpStream,
    os::unix::{net::UnixListener, process::ExitStatusExt},
    path::{Path, PathBuf},
    process::{Command, Output},
};

use ft_vhost::sandbox::Sandbox;
use nix::libc;

const CASE: &str = "FT_SANDBOX_CASE";
const DIRECTORY: &str = "FT_SANDBOX_DIRECTORY";

/// Runs one case in a process of its own.
fn confined(case: &str, directory: &Path) -> Output {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["inside", "--exact", "--ignored", "--nocapture"])
        .env(CASE, case)
        .env(DIRECTORY, directory)
        .output()
        .unwrap();
    eprintln!("{case}: {}", String::from_utf8_lossy(&output.stderr));
    output
}

fn sandbox(directory: &Path) -> Sandbox {
    let mut sandbox = Sandbox::default();
    sandbox.binds(&directory.join("sockets/socket"));
    sandbox.keeps(&directory.join("files/mark"));
    sandbox.appends(&directory.join("events"));
    sandbox
}

/// What the other tests run in a process of their own.
#[test]
#[ignore = "run by the tests below"]
fn inside() {
    let directory = PathBuf::from(std::env::var_os(DIRECTORY).unwrap());
    let image = File::options()
        .read(true)
        .write(true)
        .open(directory.join("image"))
        .unwrap();
    sandbox(&directory).enter().unwrap();
    match std::env::var(CASE).unwrap().as_str() {
        "program" => drop(Command::new("/bin/true").status()),
        // SAFETY: fork(2) as a bare call; a child, if there is one, ends at once.
        "fork" => unsafe {
            if libc::syscall(libc::SYS_fork) == 0 {
                libc::_exit(0);
            }
        },
        // SAFETY: asks for memory of its own, which nobody uses.
        "executable" => unsafe {
            let (access, kind) = (
                libc::PROT_READ | libc::PROT_EXEC,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            );
            libc::mmap(std::ptr::null_mut(), 4096, access, kind, -1, 0);
        },
        // SAFETY: kill(2) with signal 0 changes nothing.
        "signal" => unsafe {
            libc::kill(libc::getppid(), 0);
        },
        "internet" => drop(TcpStream::connect("127.0.0.1:9")),
        "packets" => {
            // SAFETY: opens a descriptor, which ends with this process.
            unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW, 0) };
        }
        "work" => work(&directory, &image),
        other => panic!("no case {other}"),
    }
}

/// What a daemon goes on doing.
fn work(directory: &Path, image: &File) {
    image.set_len(8192).unwrap();
    image.sync_data().unwrap();
    let mut threads = Vec::new();
    for name in ["one", "two"] {
        let thread = std::thread::Builder::new().name(name.into());
        threads.push(thread.spawn(|| vec![1u8; 1 << 20].len()).unwrap());
    }
    assert!(threads.into_iter().all(|thread| thread.join().unwrap() == 1 << 20));
    let socket = directory.join("sockets/socket");
    for _ in 0..2 {
        drop(UnixListener::bind(&socket).unwrap());
        fs::remove_file(&socket).unwrap();
    }
    let (mark, new) = (directory.join("files/mark"), directory.join("files/mark.new"));
    for content in ["one", "two"] {
        fs::write(&new, content).unwrap();
        fs::rename(&new, &mark).unwrap();
        File::open(mark.parent().unwrap()).unwrap().sync_all().unwrap();
        assert_eq!(fs::read_to_string(&mark).unwrap(), content);
    }
    fs::remove_file(&mark).unwrap();
    File::options()
        .append(true)
        .create(true)
        .open(directory.join("events"))
        .unwrap();
    // What is not its business, where the kernel keeps it from that.
    let denied = [
        File::open("/etc/passwd").map(drop),
        File::open(directory.join("image")).map(drop),
        fs::read_dir(directory.join("sockets")).map(drop),
        fs::write(directory.join("sockets/file"), ""),
        fs::write(directory.join("other"), ""),
        fs::remove_file(directory.join("image")),
        File::open("/proc/self/mem").map(drop),
    ];
    let denials = denied
        .iter()
        .filter(|result| matches!(result, Err(error) if error.kind() == PermissionDenied));
    println!("denied: {} of {}", denials.count(), denied.len());
}

fn directory() -> tempfile::TempDir {
    let directory = tempfile::TempDir::new().unwrap();
    for name in ["sockets", "files"] {
        fs::create_dir(directory.path().join(name)).unwrap();
    }
    for name in ["image", "events"] {
        fs::write(directory.path().join(name), [0; 4096]).unwrap();
    }
    directory
}

#[test]
fn a_forbidden_call_ends_the_process_with_a_line_that_names_it() {
    let directory = directory();
    for (case, call) in [
        ("fork", libc::SYS_fork),
        ("executable", libc::SYS_mmap),
        ("signal", libc::SYS_getppid),
        ("internet", libc::SYS_socket),
        ("packets", libc::SYS_socket),
    ] {
        let output = confined(case, directory.path());
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.signal(), Some(libc::SIGABRT), "{case}: {output:?}");
        let named = format!("the sandbox forbids system call {call} ");
        assert!(said.contains(&named), "{case}: {said}");
    }
    // posix_spawn(3) blocks every signal: there is no line, and no program either.
    let output = confined("program", directory.path());
    assert_eq!(output.status.signal(), Some(libc::SIGSYS), "{output:?}");
}

#[test]
fn what_a_daemon_does_goes_on_and_other_files_are_closed_to_it() {
    let directory = directory();
    let output = confined("work", directory.path());
    assert!(output.status.success(), "{output:?}");
    let said = String::from_utf8_lossy(&output.stdout);
    // SAFETY: asks for Landlock's version and touches nothing.
    let version = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, std::ptr::null::<u8>(), 0usize, 1u32) };
    let denied = if version > 0 { 7 } else { 0 };
    assert!(said.contains(&format!("denied: {denied} of 7")), "{said}");
}
