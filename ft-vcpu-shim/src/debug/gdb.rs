//! The remote protocol of gdb over a [`Session`]: registers, memory through the guest's page tables, breakpoints, forwards and
//! backwards, and `monitor` commands in the terms of the log.
//!
//! Nothing is written to the guest: a replay that was changed is not the recorded execution any more, so gdb is refused.

use std::{
    net::{SocketAddr, TcpListener, TcpStream},
    os::unix::net::{UnixListener, UnixStream},
    path::PathBuf,
    str::FromStr,
};

use gdbstub::{
    common::Signal,
    conn::{Connection, ConnectionExt},
    outputln,
    stub::{
        DisconnectReason, GdbStub, GdbStubError, SingleThreadStopReason,
        run_blocking::{BlockingEventLoop, Event, WaitForStopReasonError},
    },
    target::{
        Target as GdbTarget, TargetError, TargetResult,
        ext::{
            base::{
                BaseOps,
                reverse_exec::{ReplayLogPosition, ReverseCont, ReverseContOps, ReverseStep, ReverseStepOps},
                singlethread::{
                    SingleThreadBase, SingleThreadResume, SingleThreadResumeOps, SingleThreadSingleStep,
                    SingleThreadSingleStepOps,
                },
            },
            breakpoints::{Breakpoints, BreakpointsOps, HwBreakpoint, HwBreakpointOps, SwBreakpoint, SwBreakpointOps},
            monitor_cmd::{ConsoleOutput, MonitorCmd, MonitorCmdOps},
        },
    },
};
use gdbstub_arch::x86::{X86_64_SSE, reg::X86_64CoreRegs};

use super::{
    disassembly,
    registers::{self, memory_of},
    session::{Halt, Session},
    target::{Reached, Target},
    trace,
};
use crate::{error::Error, machine::vcpu::CpuState};

/// Where gdb connects: `unix:PATH` or `tcp:IP:PORT`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A Unix socket.
    Unix(PathBuf),
    /// A TCP port of this host: there is no authentication, so no other address is allowed.
    Tcp(SocketAddr),
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            Some(("unix", path)) if !path.is_empty() => Ok(Self::Unix(path.into())),
            Some(("tcp", address)) => match address.parse::<SocketAddr>() {
                Ok(address) if address.ip().is_loopback() => Ok(Self::Tcp(address)),
                Ok(_) => Err("whoever connects reads the guest's memory: give a loopback address, or unix:PATH".into()),
                Err(error) => Err(format!("'{address}' is no IP:PORT: {error}")),
            },
            _ => Err(format!("'{text}' is neither unix:PATH nor tcp:IP:PORT")),
        }
    }
}

/// Waits for one gdb at `address` and serves it until it leaves.
///
/// # Errors
/// A socket that cannot be had, or a replay that cannot go on.
pub fn serve(session: Session, address: &Address) -> Result<Session, Error> {
    let failed =
        |source: std::io::Error| Error::environment(format!("cannot serve gdb at {address:?}: {source}. Check --gdb"));
    if let Err(reason) = session.support() {
        tracing::warn!(
            "this host's KVM has no breakpoints: {reason}. `stepi` and `reverse-stepi` move from stop to stop"
        );
    }
    match address {
        Address::Unix(path) => {
            let listener = UnixListener::bind(path).map_err(failed)?;
            tracing::info!("waiting for gdb: target remote {}", path.display());
            let connection = listener.accept().map_err(failed);
            // One client only; what is left would make the next start fail.
            let _ = std::fs::remove_file(path);
            converse::<UnixStream>(session, connection?.0)
        }
        Address::Tcp(address) => {
            let listener = TcpListener::bind(address).map_err(failed)?;
            tracing::info!(
                "waiting for gdb: target remote {}",
                listener.local_addr().map_err(failed)?
            );
            let (connection, _) = listener.accept().map_err(failed)?;
            converse::<TcpStream>(session, connection)
        }
    }
}

fn converse<C>(session: Session, connection: C) -> Result<Session, Error>
where
    C: ConnectionExt + 'static,
    C::Error: std::fmt::Debug,
{
    let mut stub = Stub { session, going: None };
    match GdbStub::new(connection).run_blocking::<EventLoop<C>>(&mut stub) {
        Ok(reason) => {
            match reason {
                DisconnectReason::Kill => tracing::info!("gdb ended the replay"),
                _ => tracing::info!("gdb left: {reason:?}"),
            }
            Ok(stub.session)
        }
        Err(error) if error.is_target_error() => Err(error.into_target_error().expect("it is one")),
        // A client that goes without a word has ended its session too.
        Err(error) if error.is_connection_error() => {
            tracing::info!("gdb is gone: {}", describe(&error));
            Ok(stub.session)
        }
        Err(error) => Err(Error::environment(format!("gdb's protocol: {}", describe(&error)))),
    }
}

fn describe<E: std::fmt::Debug>(error: &GdbStubError<Error, E>) -> String {
    format!("{error:?}")
}

/// What gdb asked for last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Going {
    On,
    Step,
    Back,
    StepBack,
}

struct Stub {
    session: Session,
    going: Option<Going>,
}

impl Stub {
    fn state(&self) -> Result<CpuState, TargetError<Error>> {
        self.session.execution().vcpu().state().map_err(TargetError::Fatal)
    }

    fn go(&mut self, interrupted: impl FnMut() -> bool) -> Result<SingleThreadStopReason<u64>, Error> {
        let halt = match self.going.take() {
            Some(Going::On) => self.session.resume(interrupted)?,
            Some(Going::Step) => self.session.step()?,
            Some(Going::Back) => self.session.reverse_continue()?,
            Some(Going::StepBack) => self.session.reverse_step()?,
            None => Halt::There,
        };
        let at = |pos| SingleThreadStopReason::ReplayLog { tid: None, pos };
        Ok(match halt {
            Halt::There => SingleThreadStopReason::DoneStep,
            Halt::Breakpoint => SingleThreadStopReason::HwBreak(()),
            Halt::Interrupted => SingleThreadStopReason::Signal(Signal::SIGINT),
            Halt::Begin => at(ReplayLogPosition::Begin),
            Halt::End(how) => {
                tracing::info!("the recorded execution ends here: {how}");
                at(ReplayLogPosition::End)
            }
        })
    }

    fn monitor(&mut self, command: &str, out: &mut ConsoleOutput<'_>) -> Result<(), Error> {
        let mut words = command.split_whitespace();
        let moved = match (words.next(), words.next(), words.next()) {
            (Some("position"), None, None) => Halt::There,
            (Some("next-stop"), count, None) => match count.unwrap_or("1").parse::<u64>() {
                Ok(count) => self.next_stops(count)?,
                Err(_) => return say(out, "how many stops?"),
            },
            (Some("goto"), Some(target), None) => match target.parse::<Target>() {
                Ok(target) => {
                    let halt = self.session.goto(target)?;
                    let last = self.session.execution().history().last();
                    if last.is_some_and(|record| target.reached(record) != Reached::Here) {
                        outputln!(out, "the recorded execution has no stop at {target}");
                    }
                    halt
                }
                Err(reason) => return say(out, &reason),
            },
            (Some("stops"), count, None) => {
                let count = count.unwrap_or("10").parse().unwrap_or(10);
                for record in self.session.execution().history().tail(count) {
                    outputln!(out, "{}", trace::line(record));
                }
                return Ok(());
            }
            (Some("registers"), None, None) => {
                let state = self.session.execution().vcpu().state()?;
                for line in registers::state_table(&state).lines() {
                    outputln!(out, "{}", line);
                }
                return Ok(());
            }
            (Some("support"), None, None) => {
                match self.session.support() {
                    Ok(()) => outputln!(out, "breakpoints and single steps: yes"),
                    Err(reason) => outputln!(out, "breakpoints and single steps: no, {reason}"),
                }
                return Ok(());
            }
            _ => {
                return say(
                    out,
                    "commands: position | next-stop [N] | goto EXITS|EXITS+OFFSET|lsn:LSN | stops [N] | registers | support",
                );
            }
        };
        if let Halt::End(how) = moved {
            outputln!(out, "the recorded execution ends here: {how}");
        }
        self.say_position(out)?;
        if !command.trim().starts_with("position") {
            outputln!(
                out,
                "gdb keeps the registers it has read: say `maintenance flush register-cache`"
            );
        }
        Ok(())
    }

    fn next_stops(&mut self, count: u64) -> Result<Halt, Error> {
        for _ in 0..count {
            let halt = self.session.next_stop()?;
            if halt != Halt::There {
                return Ok(halt);
            }
        }
        Ok(Halt::There)
    }

    fn say_position(&self, out: &mut ConsoleOutput<'_>) -> Result<(), Error> {
        match self.session.execution().history().last() {
            None => outputln!(out, "at power-on"),
            Some(record) => outputln!(out, "{}", trace::line(record)),
        }
        let vcpu = self.session.execution().vcpu();
        let state = vcpu.state()?;
        for line in disassembly::around(&memory_of(vcpu, &state), state.regs.rip).lines() {
            outputln!(out, "{}", line);
        }
        Ok(())
    }
}

fn say(out: &mut ConsoleOutput<'_>, text: &str) -> Result<(), Error> {
    outputln!(out, "{text}");
    Ok(())
}

/// gdb's layout of the registers.
fn core_registers(state: &CpuState, to: &mut X86_64CoreRegs) {
    let (regs, sregs, fpu) = (&state.regs, &state.sregs, &state.fpu);
    to.regs = [
        regs.rax, regs.rbx, regs.rcx, regs.rdx, regs.rsi, regs.rdi, regs.rbp, regs.rsp, regs.r8, regs.r9, regs.r10,
        regs.r11, regs.r12, regs.r13, regs.r14, regs.r15,
    ];
    to.rip = regs.rip;
    to.eflags = regs.rflags as u32;
    to.segments.cs = u32::from(sregs.cs.selector);
    to.segments.ss = u32::from(sregs.ss.selector);
    to.segments.ds = u32::from(sregs.ds.selector);
    to.segments.es = u32::from(sregs.es.selector);
    to.segments.fs = u32::from(sregs.fs.selector);
    to.segments.gs = u32::from(sregs.gs.selector);
    for (to, from) in to.st.iter_mut().zip(&fpu.fpr) {
        to.copy_from_slice(&from[..10]);
    }
    to.fpu.fctrl = u32::from(fpu.fcw);
    to.fpu.fstat = u32::from(fpu.fsw);
    to.fpu.ftag = u32::from(fpu.ftwx);
    to.fpu.fop = u32::from(fpu.last_opcode);
    to.fpu.fioff = fpu.last_ip as u32;
    to.fpu.fooff = fpu.last_dp as u32;
    to.xmm = fpu.xmm.map(u128::from_le_bytes);
    to.mxcsr = fpu.mxcsr;
}

impl GdbTarget for Stub {
    type Arch = X86_64_SSE;
    type Error = Error;

    fn base_ops(&mut self) -> BaseOps<'_, Self::Arch, Self::Error> {
        BaseOps::SingleThread(self)
    }

    fn support_breakpoints(&mut self) -> Option<BreakpointsOps<'_, Self>> {
        Some(self)
    }

    fn support_monitor_cmd(&mut self) -> Option<MonitorCmdOps<'_, Self>> {
        Some(self)
    }
}

impl SingleThreadBase for Stub {
    fn read_registers(&mut self, regs: &mut X86_64CoreRegs) -> TargetResult<(), Self> {
        core_registers(&self.state()?, regs);
        Ok(())
    }

    fn write_registers(&mut self, _regs: &X86_64CoreRegs) -> TargetResult<(), Self> {
        Err(TargetError::NonFatal)
    }

    fn read_addrs(&mut self, start: u64, data: &mut [u8]) -> TargetResult<usize, Self> {
        let state = self.state()?;
        memory_of(self.session.execution().vcpu(), &state)
            .read(start, data)
            .map_err(|_| TargetError::NonFatal)
    }

    fn write_addrs(&mut self, _start: u64, _data: &[u8]) -> TargetResult<(), Self> {
        Err(TargetError::NonFatal)
    }

    fn support_resume(&mut self) -> Option<SingleThreadResumeOps<'_, Self>> {
        Some(self)
    }
}

impl SingleThreadResume for Stub {
    fn resume(&mut self, _signal: Option<Signal>) -> Result<(), Error> {
        self.going = Some(Going::On);
        Ok(())
    }

    fn support_single_step(&mut self) -> Option<SingleThreadSingleStepOps<'_, Self>> {
        Some(self)
    }

    fn support_reverse_step(&mut self) -> Option<ReverseStepOps<'_, (), Self>> {
        Some(self)
    }

    fn support_reverse_cont(&mut self) -> Option<ReverseContOps<'_, (), Self>> {
        Some(self)
    }
}

impl SingleThreadSingleStep for Stub {
    fn step(&mut self, _signal: Option<Signal>) -> Result<(), Error> {
        self.going = Some(Going::Step);
        Ok(())
    }
}

impl ReverseStep<()> for Stub {
    fn reverse_step(&mut self, _thread: ()) -> Result<(), Error> {
        self.going = Some(Going::StepBack);
        Ok(())
    }
}

impl ReverseCont<()> for Stub {
    fn reverse_cont(&mut self) -> Result<(), Error> {
        self.going = Some(Going::Back);
        Ok(())
    }
}

impl Stub {
    fn add_breakpoint(&mut self, address: u64) -> bool {
        match self.session.add_breakpoint(address) {
            Ok(()) => true,
            Err(reason) => {
                tracing::warn!("the breakpoint at {address:#x} is refused: {reason}");
                false
            }
        }
    }
}

impl Breakpoints for Stub {
    fn support_sw_breakpoint(&mut self) -> Option<SwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_breakpoint(&mut self) -> Option<HwBreakpointOps<'_, Self>> {
        Some(self)
    }
}

/// A breakpoint in memory would change the guest: gdb's ordinary ones use the debug registers too.
impl SwBreakpoint for Stub {
    fn add_sw_breakpoint(&mut self, address: u64, _kind: usize) -> TargetResult<bool, Self> {
        Ok(self.add_breakpoint(address))
    }

    fn remove_sw_breakpoint(&mut self, address: u64, _kind: usize) -> TargetResult<bool, Self> {
        Ok(self.session.remove_breakpoint(address))
    }
}

impl HwBreakpoint for Stub {
    fn add_hw_breakpoint(&mut self, address: u64, _kind: usize) -> TargetResult<bool, Self> {
        Ok(self.add_breakpoint(address))
    }

    fn remove_hw_breakpoint(&mut self, address: u64, _kind: usize) -> TargetResult<bool, Self> {
        Ok(self.session.remove_breakpoint(address))
    }
}

impl MonitorCmd for Stub {
    fn handle_monitor_cmd(&mut self, command: &[u8], mut out: ConsoleOutput<'_>) -> Result<(), Error> {
        let command = String::from_utf8_lossy(command).into_owned();
        self.monitor(&command, &mut out)
    }
}

struct EventLoop<C>(std::marker::PhantomData<C>);

impl<C: ConnectionExt> BlockingEventLoop for EventLoop<C> {
    type Target = Stub;
    type Connection = C;
    type StopReason = SingleThreadStopReason<u64>;

    fn wait_for_stop_reason(
        target: &mut Stub,
        connection: &mut C,
    ) -> Result<Event<Self::StopReason>, WaitForStopReasonError<Error, <C as Connection>::Error>> {
        // Data from gdb while the guest goes on is its interrupt; a connection that broke ends the waiting too, and the
        // next read says so.
        let reason = target
            .go(|| !matches!(connection.peek(), Ok(None)))
            .map_err(WaitForStopReasonError::Target)?;
        if reason == SingleThreadStopReason::Signal(Signal::SIGINT) {
            target.going = None;
            let byte = connection.read().map_err(WaitForStopReasonError::Connection)?;
            return Ok(Event::IncomingData(byte));
        }
        Ok(Event::TargetStopped(reason))
    }

    fn on_interrupt(_target: &mut Stub) -> Result<Option<Self::StopReason>, Error> {
        Ok(Some(SingleThreadStopReason::Signal(Signal::SIGINT)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_this_host_may_connect() {
        assert_eq!("unix:/run/g".parse(), Ok(Address::Unix("/run/g".into())));
        assert!("tcp:127.0.0.1:1234".parse::<Address>().is_ok());
        for text in ["", "unix:", "tcp:1234", "tcp:0.0.0.0:1234", "tcp:10.0.0.1:1", "/run/g"] {
            assert!(text.parse::<Address>().is_err(), "{text}");
        }
    }
}
