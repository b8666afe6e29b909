//! A tiny guest that needs no devices but the clock, and a log to record it into.

#![allow(dead_code, unreachable_pub, reason = "each test binary uses its part")]

pub mod branch_counter;
pub mod step_clock;

use std::{
    arch::global_asm,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use clap::Parser;
use ft_client::{LogWriter, Region, journal::SegmentHeader, ring};
use ft_protocol::{Body, Generation, Lsn, Role, entry::Entry, held::Committed};
use ft_vcpu_shim::{
    command::machine::{Loaded, MachineArgs},
    error::Error,
    lockstep::{
        digest::Digests,
        execution::{End, Execution},
        position::Unrecorded,
        record::Recorder,
    },
};
use vmm_sys_util::eventfd::EventFd;

// What all of them begin with: a stack, the clock's interrupt (vector 0x29) at `6:`, both 8259A with automatic EOI and nothing masked, the
// clock at RBX, an empty R9. And what they end with: "ok" on the console, power off.
global_asm!(
    r#"
    .macro guest_vector vector, handler
    lea rax, [rip + \handler]
    mov rdi, 0x20000 + \vector * 16
    mov word ptr [rdi], ax
    mov word ptr [rdi + 2], 0x10
    mov word ptr [rdi + 4], 0x8e00
    shr rax, 16
    mov word ptr [rdi + 6], ax
    mov qword ptr [rdi + 8], 0
    .endm

    .macro controllers mode
    mov al, 0x11
    out 0x20, al
    out 0xa0, al
    mov al, 0x20
    out 0x21, al
    mov al, 0x28
    out 0xa1, al
    mov al, 4
    out 0x21, al
    mov al, 2
    out 0xa1, al
    mov al, \mode
    out 0x21, al
    out 0xa1, al
    xor eax, eax
    out 0x21, al
    out 0xa1, al
    .endm

    .macro guest_begins
    mov rsp, 0x7000
    guest_vector 0x29, 6f
    lidt [rip + 7f]
    controllers 3
    mov rbx, 0xd000f000
    xor r8, r8
    xor r9, r9
    .endm

    .macro guest_ends
    mov dx, 0x3f8
    mov al, 'o'
    out dx, al
    mov al, 'k'
    out dx, al
    mov al, 10
    out dx, al
    mov dx, 0x604
    mov ax, 0x2000
    out dx, ax
5:  jmp 5b
    .endm

    .section .rodata.guests, "a"
    .global tiny_guest_start
    .global tiny_guest_end
    .global busy_guest_start
    .global busy_guest_end
    .global halted_guest_start
    .global halted_guest_end
    .global fault_guest_start
    .global fault_guest_end
    .global half_guest_start
    .global half_guest_end
    .global msr_guest_start
    .global msr_guest_end

    # 200 times: read the clock, set the alarm 50 us ahead, halt until its interrupt.
tiny_guest_start:
    guest_begins
    mov ecx, 200
2:
    mov rax, qword ptr [rbx]
    add r8, rax
    add rax, 50000
    mov qword ptr [rbx + 8], rax
    sti
    hlt
    cli
    dec ecx
    jnz 2b
    guest_ends
6:  add r9, r8
    mov qword ptr [rbx + 8], 0
    iretq
7:  .word 0xfff
    .quad 0x20000
tiny_guest_end:

    # 12 times: set the alarm 2 ms ahead and compute, without an exit, until its interrupt came. What is computed goes through
    # memory, 16 pages of it, whose sum is in a register at the last exits.
busy_guest_start:
    guest_begins
    mov ecx, 12
2:
    mov rax, qword ptr [rbx]
    add rax, 2000000
    mov qword ptr [rbx + 8], rax
    mov r10, r9
    sti
3:  add r8, 0x1e3779b9
    mov rsi, r8
    and rsi, 0xfff8
    add qword ptr [rsi + 0x200000], r8
    xor r8, qword ptr [rsi + 0x200000]
    cmp r9, r10
    je 3b
    cli
    dec ecx
    jnz 2b
    mov rsi, 0x200000
4:  add r8, qword ptr [rsi]
    add rsi, 8
    cmp rsi, 0x210000
    jb 4b
    guest_ends
6:  inc r9
    mov qword ptr [rbx + 8], 0
    iretq
7:  .word 0xfff
    .quad 0x20000
busy_guest_end:

    # Halts with interrupts off.
halted_guest_start:
    cli
    hlt
    guest_ends
halted_guest_end:

    # 20 times: an RDMSR that faults while the clock's interrupt waits to enter. No automatic EOI: an interrupt that KVM took and the
    # guest did not see would keep out all that follow. Interrupts are counted in R8, faults in R9.
fault_guest_start:
    guest_begins
    guest_vector 13, 8f
    controllers 1
    mov r10d, 20
2:
    cli
    mov rax, qword ptr [rbx]
    mov qword ptr [rbx + 8], rax
    mov ecx, 0xe7
    sti
    nop
    rdmsr
    in al, 0x80
    in al, 0x80
    dec r10d
    jnz 2b
    guest_ends
6:  inc r8
    push rax
    mov qword ptr [rbx + 8], 0
    mov al, 0x20
    out 0xa0, al
    out 0x20, al
    pop rax
    iretq
8:  inc r9
    add qword ptr [rsp + 8], 2
    add rsp, 8
    iretq
7:  .word 0xfff
    .quad 0x20000
fault_guest_end:

    # 20 times each, while the clock's interrupt waits to enter: string input and a copy from a device, both into unmapped memory, which fault
    # while they are finished; and an access to a device that reads and writes. Interrupts are counted in R8, faults in R9.
    .macro while_the_alarm_is_due
    cli
    mov rax, qword ptr [rbx]
    mov qword ptr [rbx + 8], rax
    mov rsi, rbx
    movabs rdi, 0x8000000000
    mov edx, 0x80
    sti
    nop
    .endm

half_guest_start:
    guest_begins
    guest_vector 14, 8f
    controllers 1
    mov r10d, 20
2:
    while_the_alarm_is_due
    insw
    in al, 0x80
    in al, 0x80
    while_the_alarm_is_due
    movsq
    in al, 0x80
    in al, 0x80
    while_the_alarm_is_due
    or qword ptr [rbx + 0x20], 1
    in al, 0x80
    in al, 0x80
    dec r10d
    jnz 2b
    guest_ends
6:  inc r8
    push rax
    mov qword ptr [rbx + 8], 0
    mov al, 0x20
    out 0xa0, al
    out 0x20, al
    pop rax
    iretq
8:  inc r9
    add qword ptr [rsp + 8], 2
    add rsp, 8
    iretq
7:  .word 0xfff
    .quad 0x20000
half_guest_end:

    # 50 times: read the time stamp counter by RDMSR, into R8, and MPERF, which faults, as do KVM's clock and DEBUGCTL: each fault counts 1 in R9.
msr_guest_start:
    guest_begins
    guest_vector 13, 8f
    mov r10d, 50
2:
    mov ecx, 0x10
    rdmsr
    shl rdx, 32
    or rax, rdx
    add r8, rax
    mov ecx, 0xe7
    rdmsr
    mov ecx, 0x4b564d01
    wrmsr
    mov ecx, 0x1d9
    rdmsr
    mov eax, 1
    xor edx, edx
    wrmsr
    mov ecx, 0x1db
    rdmsr
    mov ecx, 0xc0011029
    rdmsr
    xor eax, eax
    xor edx, edx
    wrmsr
    dec r10d
    jnz 2b
    guest_ends
6:  iretq
8:  inc r9
    add qword ptr [rsp + 8], 2
    add rsp, 8
    iretq
7:  .word 0xfff
    .quad 0x20000
msr_guest_end:
    .text
    "#
);

unsafe extern "C" {
    static tiny_guest_start: u8;
    static tiny_guest_end: u8;
    static busy_guest_start: u8;
    static busy_guest_end: u8;
    static halted_guest_start: u8;
    static halted_guest_end: u8;
    static fault_guest_start: u8;
    static fault_guest_end: u8;
    static half_guest_start: u8;
    static half_guest_end: u8;
    static msr_guest_start: u8;
    static msr_guest_end: u8;
}

/// The guest that waits for its alarms, as an ELF file with one segment at 1 MiB.
pub fn tiny_guest() -> Vec<u8> {
    // SAFETY: both symbols are in this binary and frame the guest's bytes in one read-only section.
    elf(unsafe { between(&raw const tiny_guest_start, &raw const tiny_guest_end) })
}

/// The guest that computes until its alarms interrupt it.
pub fn busy_guest() -> Vec<u8> {
    // SAFETY: as above.
    elf(unsafe { between(&raw const busy_guest_start, &raw const busy_guest_end) })
}

/// The guest that nothing wakes.
pub fn halted_guest() -> Vec<u8> {
    // SAFETY: as above.
    elf(unsafe { between(&raw const halted_guest_start, &raw const halted_guest_end) })
}

/// The guest whose interrupts meet faults.
pub fn fault_guest() -> Vec<u8> {
    // SAFETY: as above.
    elf(unsafe { between(&raw const fault_guest_start, &raw const fault_guest_end) })
}

/// The guest whose interrupts meet accesses that are not over when they stop.
pub fn half_guest() -> Vec<u8> {
    // SAFETY: as above.
    elf(unsafe { between(&raw const half_guest_start, &raw const half_guest_end) })
}

/// The guest that reads its host's MSRs.
pub fn msr_guest() -> Vec<u8> {
    // SAFETY: as above.
    elf(unsafe { between(&raw const msr_guest_start, &raw const msr_guest_end) })
}

/// # Safety
/// Both are in one section of this binary, `start` first.
unsafe fn between(start: *const u8, end: *const u8) -> &'static [u8] {
    // SAFETY: the caller's promise; a section is read-only and lives as long as the process.
    unsafe { std::slice::from_raw_parts(start, end.offset_from(start) as usize) }
}

fn elf(code: &[u8]) -> Vec<u8> {
    let mut elf = Vec::from(*b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    elf.extend([2u16, 62].iter().flat_map(|half| half.to_le_bytes()));
    elf.extend(1u32.to_le_bytes());
    elf.extend([0x10_0000u64, 64, 0].iter().flat_map(|word| word.to_le_bytes()));
    elf.extend(0u32.to_le_bytes());
    elf.extend([64u16, 56, 1, 64, 0, 0].iter().flat_map(|half| half.to_le_bytes()));
    elf.extend([1u32, 7].iter().flat_map(|word| word.to_le_bytes()));
    let size = code.len() as u64;
    elf.extend(
        [120u64, 0x10_0000, 0x10_0000, size, size, 0x1000]
            .iter()
            .flat_map(|word| word.to_le_bytes()),
    );
    elf.extend(code);
    elf
}

#[derive(Parser)]
struct Flags {
    #[command(flatten)]
    machine: MachineArgs,
}

/// Where [`machine`] puts the guest.
pub fn kernel(directory: &tempfile::TempDir) -> PathBuf {
    directory.path().join("guest.elf")
}

pub fn machine(directory: &tempfile::TempDir) -> MachineArgs {
    machine_of(directory, &tiny_guest())
}

pub fn machine_of(directory: &tempfile::TempDir, guest: &[u8]) -> MachineArgs {
    let path = kernel(directory);
    std::fs::write(&path, guest).unwrap();
    Flags::parse_from(["test", "--ram-mib", "4", "--kernel", path.to_str().unwrap()]).machine
}

/// Runs the guest recorded, against an ft-log that commits what it sees.
pub fn record(args: &MachineArgs, console: &Path) -> (Digests, Vec<Vec<u8>>) {
    record_with(args, console, |_| {})
}

/// The same, with an execution that is changed before it starts.
pub fn record_with(
    args: &MachineArgs,
    console: &Path,
    prepare: impl FnOnce(&mut Execution),
) -> (Digests, Vec<Vec<u8>>) {
    let (end, digests, frames) = run_recorded(args, console, |execution, _| prepare(execution));
    assert_eq!(end.unwrap(), End::PowerOff);
    (digests, frames)
}

/// Runs the guest recorded to whatever end; `prepare` gets what tells the shim its role, too.
pub fn run_recorded(
    args: &MachineArgs,
    console: &Path,
    prepare: impl FnOnce(&mut Execution, &Arc<Region>),
) -> (Result<End, Error>, Digests, Vec<Vec<u8>>) {
    run_logged(
        args.load().unwrap(),
        console,
        |recorder| recorder,
        |execution, region| {
            prepare(execution, region);
            execution.run()
        },
    )
}

/// Runs the guest recorded, by `run`, which may take its time between the steps.
pub fn run_recorded_by(
    args: &MachineArgs,
    console: &Path,
    run: impl FnOnce(&mut Execution) -> Result<End, Error>,
) -> (Result<End, Error>, Digests, Vec<Vec<u8>>) {
    run_logged(
        args.load().unwrap(),
        console,
        |recorder| recorder,
        |execution, _| run(execution),
    )
}

/// Runs the guest as `run --unrecorded` does.
pub fn run_unrecorded(args: &MachineArgs, console: &Path) -> (Result<End, Error>, Digests, Vec<Vec<u8>>) {
    let machine = args.load_unrecorded().unwrap();
    run_logged(machine, console, Recorder::unrecorded, |execution, _| {
        execution.set_clock(Box::new(Unrecorded));
        execution.run()
    })
}

fn run_logged(
    machine: Loaded,
    console: &Path,
    with: impl FnOnce(Recorder) -> Recorder,
    run: impl FnOnce(&mut Execution, &Arc<Region>) -> Result<End, Error>,
) -> (Result<End, Error>, Digests, Vec<Vec<u8>>) {
    let region = Arc::new(Region::create().unwrap());
    region.publish(Role::Recording, Generation(1), Lsn(0));
    let memory = ring::create("test-log").unwrap();
    let mut consumer = ring::Consumer::new(memory.fd().try_clone_to_owned().unwrap()).unwrap();
    let log = LogWriter::new(
        ring::Producer::on(memory),
        EventFd::new(0).unwrap(),
        Arc::clone(&region),
    );
    let ended = Arc::new(AtomicBool::new(false));
    let keeper = std::thread::spawn({
        let (region, ended) = (Arc::clone(&region), Arc::clone(&ended));
        move || {
            let mut frames = Vec::new();
            loop {
                let done = ended.load(Ordering::Acquire);
                let mut frame = Vec::new();
                while consumer.pop(&mut frame).unwrap().is_some() {
                    let entry = Entry::decode(&frame).unwrap();
                    let off = matches!(entry.body, Body::PowerOff { .. });
                    region.commit(Committed::through(entry.lsn)).for_each(drop);
                    frames.push(std::mem::take(&mut frame));
                    if off {
                        region.publish(Role::Off, Generation(1), Lsn(0));
                    }
                }
                if done {
                    return frames;
                }
                std::thread::yield_now();
            }
        }
    });
    let console = std::fs::File::create(console).unwrap();
    let recorder = with(Recorder::new(log, Arc::clone(&region), console, Vec::new(), 0));
    let mut execution = machine
        .power_on(Vec::new(), Box::new(recorder), Box::new(|_, _| {}))
        .unwrap();
    let end = run(&mut execution, &region);
    ended.store(true, Ordering::Release);
    (end, execution.digests(), keeper.join().unwrap())
}

/// Writes `frames` as a journal into `directory`, which is made.
pub fn write_journal(directory: &Path, frames: &[Vec<u8>]) {
    std::fs::create_dir_all(directory).unwrap();
    let header = SegmentHeader {
        vm: "tiny".into(),
        generation: Generation(1),
        index: 0,
        first: Lsn(1),
    };
    let bytes = [header.encode().to_vec(), frames.concat()].concat();
    std::fs::write(directory.join(header.file_name()), bytes).unwrap();
}
