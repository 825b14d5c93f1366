//! vCPU threads: run the guest, and serve its exits right there.

#![expect(unsafe_code, reason = "a signal handler, and the parts of kvm_run that vary by exit")]

use std::cell::Cell;
use std::io;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::*};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::Instant;

use devices::bus::{Bus, View};
use iothread::{Counters, ExitCx, Thread, ThreadSpec, VcpuLoop};
use kvm_bindings::{KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use crate::ending::{End, Ending};

thread_local! {
    /// `kvm_run.immediate_exit` of the vCPU this thread runs, or null.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(ptr::null_mut()) };
}

/// Makes the next `KVM_RUN` return at once, if the signal came just before it.
extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let flag = IMMEDIATE_EXIT.with(Cell::get);
    if !flag.is_null() {
        // SAFETY: it points into the mapped kvm_run of this very thread's vCPU; `run` sets it
        // back to null before the mapping goes.
        unsafe { ptr::write_volatile(flag, 1) };
    }
}

/// Installs the handler of the signal that makes vCPUs leave the guest. Once per process.
pub fn install_kick() -> io::Result<()> {
    register_signal_handler(SIGRTMIN(), on_kick)
        .map_err(|error| io::Error::from_raw_os_error(error.errno()))
}

/// Has KVM make the threads of a machine that it makes with the first `KVM_RUN`
/// (`kvm-nx-lpage-re`), as copies of the thread that calls it: on these CPUs instead of the vCPU's
/// own. The guest does not run.
pub fn make_threads_of_kvm(fd: &mut VcpuFd, cpus: &[usize]) {
    fd.set_kvm_immediate_exit(1);
    // It returns EINTR. If there is more to say, the real first KVM_RUN says it.
    iothread::elsewhere(cpus, || drop(fd.run()));
    fd.set_kvm_immediate_exit(0);
}

/// What the vCPUs of a machine share.
#[derive(Debug)]
pub struct Shared {
    /// Port I/O.
    pub ports: Arc<Bus>,
    /// Memory-mapped I/O.
    pub mmio: Arc<Bus>,
    /// Where the end of the machine is announced.
    pub ending: Ending,
    /// vCPUs leave the guest for good.
    pub stop: AtomicBool,
}

/// A running vCPU.
#[derive(Debug)]
pub struct Vcpu {
    /// Its thread.
    pub thread: Thread,
    /// What it has done.
    pub counters: Arc<Counters>,
    /// Disconnected when the thread ends.
    alive: Receiver<()>,
}

impl Vcpu {
    /// Starts the thread, which makes its own vCPU, on its own CPUs and node; the guest runs as
    /// soon as `start` says so by being dropped.
    pub fn start(
        spec: ThreadSpec,
        make: impl FnOnce() -> io::Result<VcpuFd> + Send + 'static,
        shared: Arc<Shared>,
        start: Receiver<()>,
    ) -> io::Result<Starting> {
        let (sender, made) = sync_channel(1);
        let (living, alive) = sync_channel(1);
        let thread = iothread::start_thread(spec, move || {
            let _living: SyncSender<()> = living;
            let vcpu_loop = VcpuLoop::enter();
            match make() {
                Ok(fd) => {
                    let sent = sender.send(Ok(Arc::clone(vcpu_loop.counters())));
                    if sent.is_ok() && start.recv().is_err() {
                        run(fd, vcpu_loop, &shared);
                    }
                }
                Err(error) => drop(sender.send(Err(error))),
            }
        })?;
        Ok(Starting { thread, made, alive })
    }

    /// Waits for the end of its thread; false: `deadline` came first.
    pub fn ends_by(&self, deadline: Instant) -> bool {
        let left = deadline.saturating_duration_since(Instant::now());
        self.alive.recv_timeout(left) == Err(RecvTimeoutError::Disconnected)
    }

    /// Makes it leave the guest, to see that [`Shared::stop`] is set.
    pub fn kick(&self) {
        let (pid, tid) = (std::process::id() as libc::pid_t, self.thread.granted.tid);
        // SAFETY: signals a thread of this process; if it has ended, the call fails.
        unsafe { libc::syscall(libc::SYS_tgkill, pid, tid as libc::pid_t, SIGRTMIN()) };
    }
}

/// A vCPU whose thread may still be making it.
#[derive(Debug)]
pub struct Starting {
    thread: iothread::Starting,
    made: Receiver<io::Result<Arc<Counters>>>,
    alive: Receiver<()>,
}

impl Starting {
    /// Waits until it is made.
    pub fn wait(self) -> io::Result<Vcpu> {
        let thread = self.thread.wait()?;
        let counters = self.made.recv().map_err(|_| io::Error::other("its thread died"))??;
        Ok(Vcpu { thread, counters, alive: self.alive })
    }
}

/// Runs the guest until it ends or the machine stops.
fn run(mut fd: VcpuFd, mut vcpu_loop: VcpuLoop, shared: &Shared) {
    let flag = &raw mut fd.get_kvm_run().immediate_exit;
    IMMEDIATE_EXIT.with(|cell| cell.set(flag));
    let _clear = ClearOnDrop;
    let (mut ports, mut mmio) = (shared.ports.view(), shared.mmio.view());
    while !shared.stop.load(Acquire) {
        let end = match fd.run() {
            Ok(exit) => {
                let mut cx = vcpu_loop.exit();
                match exit {
                    VcpuExit::MmioRead(address, data) => {
                        cx.counters().mmio_exits.add(1);
                        mmio.read(address, data, &mut cx);
                        None
                    }
                    VcpuExit::MmioWrite(address, data) => {
                        cx.counters().mmio_exits.add(1);
                        mmio.write(address, data, &mut cx);
                        None
                    }
                    VcpuExit::IoIn(..) | VcpuExit::IoOut(..) => {
                        cx.counters().pio_exits.add(1);
                        port_io(&mut fd, &mut ports, &mut cx);
                        None
                    }
                    other => {
                        cx.counters().other_exits.add(1);
                        rare(&other)
                    }
                }
            }
            Err(error) => match error.errno() {
                libc::EINTR => {
                    fd.set_kvm_immediate_exit(0);
                    vcpu_loop.counters().other_exits.add(1);
                    None
                }
                libc::EAGAIN => None, // an application processor that was not started yet
                _ => Some(End::Internal(format!("KVM_RUN: {error}"))),
            },
        };
        if let Some(end) = end {
            shared.ending.announce(end);
            return;
        }
    }
}

struct ClearOnDrop;

impl Drop for ClearOnDrop {
    fn drop(&mut self) {
        IMMEDIATE_EXIT.with(|cell| cell.set(ptr::null_mut()));
    }
}

/// Serves one exit for port I/O, which may be a string of accesses to one port.
fn port_io(fd: &mut VcpuFd, ports: &mut View, cx: &mut ExitCx<'_>) {
    const OUT: u8 = 1;
    let run = fd.get_kvm_run();
    // SAFETY: the exit reason is KVM_EXIT_IO, so `io` is the part of the union that is set.
    let io = unsafe { run.__bindgen_anon_1.io };
    let size = usize::from(io.size).max(1);
    let len = size * io.count as usize;
    // SAFETY: KVM puts the data inside the mapped kvm_run area, at `data_offset` from its start,
    // and nothing else uses it until the next KVM_RUN.
    let data = unsafe {
        let start = ptr::from_mut(run).cast::<u8>().add(io.data_offset as usize);
        std::slice::from_raw_parts_mut(start, len)
    };
    for element in data.chunks_exact_mut(size) {
        if io.direction == OUT {
            ports.write(u64::from(io.port), element, cx);
        } else {
            ports.read(u64::from(io.port), element, cx);
        }
    }
}

/// Exits that are not device accesses; some end the machine.
fn rare(exit: &VcpuExit<'_>) -> Option<End> {
    match exit {
        VcpuExit::Shutdown => Some(End::TripleFault),
        VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _) => Some(End::PowerOff),
        VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _) => Some(End::Reset),
        VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_CRASH, _) => Some(End::GuestPanic),
        VcpuExit::Hlt | VcpuExit::IrqWindowOpen | VcpuExit::Intr | VcpuExit::IoapicEoi(_) => None,
        VcpuExit::InternalError => Some(End::Internal(
            "KVM cannot emulate an instruction of the guest (KVM_EXIT_INTERNAL_ERROR)".to_owned(),
        )),
        VcpuExit::FailEntry(reason, cpu) => Some(End::Internal(format!(
            "the host CPU {cpu} refuses the guest's state (KVM_EXIT_FAIL_ENTRY {reason:#x})"
        ))),
        other => Some(End::Internal(format!("an exit heddle does not know: {other:?}"))),
    }
}
