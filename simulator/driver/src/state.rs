//! The driver's state: one device, and tables of handles.
//!
//! A handle is a number that is never used twice, not an address: a stale or invented one is found missing.

use crate::abi::*;
use crate::capture::Capture;
use crate::config::Config;
use crate::event::Event;
use crate::graph::Graph;
use cuda_sim::Device;
use std::alloc::Layout;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ffi::CString;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Instant;

/// A handle as the caller sees it.
pub type Handle = u64;

/// Everything that lives as long as the process.
pub struct Driver {
    /// What the environment asks for.
    pub config: Config,
    /// The simulated GPU.
    pub device: Device,
    /// Zero of the clock of events.
    pub started: Instant,
    /// Tables.
    pub state: Mutex<State>,
}

/// A context. All share the device's memory.
#[derive(Default)]
pub struct Context {
    /// Retains of the primary context; others have one.
    pub references: u64,
    /// Whether it is the device's primary context.
    pub primary: bool,
    /// `CU_CTX_*` flags.
    pub flags: u32,
}

/// A stream: work runs at once, so it only knows whether it is being captured.
#[derive(Default)]
pub struct Stream {
    /// `CU_STREAM_*` flags.
    pub flags: u32,
    /// Priority, which nothing heeds.
    pub priority: i32,
    /// The capture it takes part in.
    pub capture: Option<Handle>,
}

/// A kernel handle.
pub struct Function {
    /// Its module.
    pub module: Handle,
    /// The program.
    pub program: cuda_sim::Function,
    /// Its name for `cuFuncGetName`, which must not move.
    pub name: CString,
    /// Attribute MAX_DYNAMIC_SHARED_SIZE_BYTES, when set.
    pub max_dynamic_shared: Option<u32>,
    /// Attribute PREFERRED_SHARED_MEMORY_CARVEOUT.
    pub carveout: i32,
}

/// A memory pool. It keeps nothing back: what is reserved is what is in use.
#[derive(Default)]
pub struct Pool {
    /// `CUmemPool_attribute` 1 to 4, which nothing heeds: reuse (int) and the release threshold (bytes).
    pub settings: BTreeMap<u32, u64>,
    /// Bytes in use.
    pub used: u64,
    /// Most bytes in use since the last reset of attribute 8 (used) and of attribute 6 (reserved).
    pub highs: [u64; 2],
}

/// Handles and the sticky error.
#[derive(Default)]
pub struct State {
    next: Handle,
    /// The error that every call returns once a kernel has failed, until the last context is gone.
    pub sticky: Option<CUresult>,
    /// Contexts.
    pub contexts: BTreeMap<Handle, Context>,
    /// Streams.
    pub streams: BTreeMap<Handle, Stream>,
    /// Events.
    pub events: BTreeMap<Handle, Event>,
    /// Modules.
    pub modules: BTreeMap<Handle, cuda_sim::Module>,
    /// Kernels.
    pub functions: BTreeMap<Handle, Function>,
    /// Captures that have begun.
    pub captures: BTreeMap<Handle, Capture>,
    /// Graphs.
    pub graphs: BTreeMap<Handle, Arc<Graph>>,
    /// Instantiated graphs.
    pub execs: BTreeMap<Handle, Arc<Graph>>,
    /// Memory pools.
    pub pools: BTreeMap<Handle, Pool>,
    /// Pool and bytes of what was allocated from pools, by address.
    pub pooled: BTreeMap<u64, (Handle, u64)>,
    /// The device's default pool and current pool, once asked for.
    pub default_pool: Option<Handle>,
    /// The pool that `cuMemAllocAsync` uses.
    pub current_pool: Option<Handle>,
    /// Host memory given out, by address.
    pub host: BTreeMap<usize, Layout>,
    /// Host memory registered by the program: bytes by address.
    pub registered: BTreeMap<usize, usize>,
}

static DRIVER: OnceLock<Driver> = OnceLock::new();

/// `cuInit`: reads the environment, makes the device.
pub fn init() -> Outcome {
    if DRIVER.get().is_some() {
        return Ok(());
    }
    let variables = std::env::vars_os().filter_map(|(k, v)| Some((k.into_string().ok()?, v.into_string().ok()?)));
    let config = Config::new(variables).map_err(|e| failure(INVALID_VALUE, e))?;
    let driver = Driver {
        device: Device::new(config.arch, config.options.clone()),
        config,
        started: Instant::now(),
        state: Mutex::new(State::default()),
    };
    if DRIVER.set(driver).is_ok() {
        // SAFETY: the handler takes no arguments and never unwinds. Should it not be registered, only the report of
        // leaks at exit is missing.
        unsafe { libc::atexit(crate::report::at_exit) };
    }
    Ok(())
}

/// The driver, once `cuInit` was called.
pub fn driver() -> Outcome<&'static Driver> {
    DRIVER.get().ok_or_else(|| failure(NOT_INITIALIZED, "cuInit was not called"))
}

thread_local! {
    /// The stack of current contexts.
    static CURRENT: RefCell<Vec<Handle>> = const { RefCell::new(Vec::new()) };
}

/// The calling thread's context; 0 is none.
pub fn current() -> Handle {
    CURRENT.with_borrow(|stack| stack.last().copied().unwrap_or(0))
}

/// Changes the calling thread's stack of contexts.
pub fn with_stack<T>(change: impl FnOnce(&mut Vec<Handle>) -> T) -> T {
    CURRENT.with_borrow_mut(change)
}

impl Driver {
    /// The tables, whether or not a context is current.
    pub fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The tables, for calls that need a usable context.
    pub fn ready(&self) -> Outcome<MutexGuard<'_, State>> {
        let state = self.in_context()?;
        match state.sticky {
            Some(code) => Err(quiet(code)),
            None => Ok(state),
        }
    }

    /// The tables, for calls that need a context, even a failed one.
    pub fn in_context(&self) -> Outcome<MutexGuard<'_, State>> {
        let state = self.lock();
        if !state.contexts.contains_key(&current()) {
            return Err(failure(INVALID_CONTEXT, "the calling thread has no context"));
        }
        Ok(state)
    }
}

impl State {
    /// A new handle. Small numbers are left to the driver's own streams, and to null.
    pub fn handle(&mut self) -> Handle {
        self.next += 16;
        0x1000 + self.next
    }

    /// Takes over the handles of an older state, so that none is given out twice.
    pub fn after(old: &State) -> State {
        State { next: old.next, ..State::default() }
    }
}

/// The error for a handle that is not in its table.
pub fn no_such(what: &str, handle: Handle) -> Failure {
    failure(INVALID_HANDLE, format!("{handle:#x} is no {what} (destroyed, or never made)"))
}
