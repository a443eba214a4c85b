//! Launches of kernels.

use crate::abi::*;
use crate::report;
use crate::state::{Driver, Handle, driver, no_such};
use crate::work::{Work, submit};
use cuda_sim::LaunchConfig;
use std::ffi::{c_uint, c_void};

/// `CUlaunchConfig`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Config {
    grid: [c_uint; 3],
    block: [c_uint; 3],
    shared: c_uint,
    stream: Handle,
    attributes: *const Attribute,
    count: c_uint,
}

impl Config {
    /// Threads of a block and its dynamic shared memory.
    pub fn threads_and_shared(&self) -> (u32, u32) {
        (self.block.iter().fold(1, |a: u32, &b| a.saturating_mul(b)), self.shared)
    }
}

/// `CUlaunchAttribute`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Attribute {
    id: c_uint,
    pad: [u8; 4],
    value: [u32; 16],
}

/// Runs a launch. A fault is printed, becomes the sticky error, and is returned at once: a GPU would return it from
/// the launch or from the next synchronisation.
pub fn run(d: &Driver, function: &cuda_sim::Function, config: &LaunchConfig, params: &[u8]) -> Outcome {
    match d.device.launch(function, config, params) {
        Ok(counted) => {
            report::counters(d, &counted);
            Ok(())
        }
        Err(fault) => {
            report::fault(d, function.name(), &fault);
            if !fault.is_refusal() {
                d.lock().sticky = Some(fault.cuda_error);
            }
            Err(quiet(fault.cuda_error))
        }
    }
}

/// Collects parameters: either a pointer to each value, or one buffer given by `extra`.
fn params(f: &cuda_sim::Function, values: &In<In<u8>>, extra: &In<usize>) -> Outcome<Vec<u8>> {
    let mut buffer = vec![0u8; f.param_bytes() as usize];
    if !extra.is_null() {
        if !values.is_null() {
            return Err(failure(INVALID_VALUE, "parameters are given twice: as pointers and in a buffer"));
        }
        let (mut start, mut bytes) = (None, None);
        // Pairs of a key and a pointer, ended by 0: 1 is the buffer, 2 points to its length.
        for i in (0..).step_by(2).take(8) {
            match extra.at(i)? {
                0 => break,
                1 => start = Some(extra.at(i + 1)?),
                2 => {
                    let length = Host::new(extra.at(i + 1)?).bytes(8)?;
                    bytes = Some(u64::from_le_bytes(length.try_into().unwrap_or_default()) as usize);
                }
                key => return Err(failure(INVALID_VALUE, format!("{key} is no key of a launch's extra options"))),
            }
        }
        let (Some(start), Some(bytes)) = (start, bytes) else {
            return Err(failure(INVALID_VALUE, "the launch's extra options lack the buffer or its length"));
        };
        if bytes != buffer.len() {
            let text = format!("kernel {} takes {} bytes of parameters, got {bytes}", f.name(), buffer.len());
            return Err(failure(LAUNCH_OUT_OF_RESOURCES, text));
        }
        buffer[..bytes].copy_from_slice(Host::new(start).bytes(bytes)?);
        return Ok(buffer);
    }
    for (i, p) in f.params().iter().enumerate() {
        let value = values.at(i)?;
        let bytes = value.take(p.bytes as usize).map_err(|_| {
            failure(INVALID_VALUE, format!("parameter {i} ({}) of kernel {} is a null pointer", p.name, f.name()))
        })?;
        let at = p.offset as usize;
        buffer.get_mut(at..at + bytes.len()).map(|room| room.copy_from_slice(&bytes)).ok_or_else(|| quiet(UNKNOWN))?;
    }
    Ok(buffer)
}

fn launch(
    c: LaunchConfig,
    stream: Handle,
    function: Handle,
    values: In<In<u8>>,
    extra: In<usize>,
    all: bool,
) -> Outcome {
    let d = driver()?;
    let (program, config) = {
        let state = d.ready()?;
        let f = state.functions.get(&function).ok_or_else(|| no_such("function", function))?;
        let registers = d.config.registers.get(f.program.name()).copied();
        (f.program.clone(), LaunchConfig { max_dynamic_shared: f.max_dynamic_shared, registers, ..c })
    };
    // Refused now even while a stream is captured, as on a GPU.
    d.device.check_launch(&program, &config).map_err(|fault| {
        report::fault(d, program.name(), &fault);
        quiet(fault.cuda_error)
    })?;
    let params = params(&program, &values, &extra)?;
    if all {
        resident(d, &program, &config)?;
    }
    submit(d, stream, Work::Launch { function: program, config, params })
}

/// A cooperative launch needs all its blocks at once.
fn resident(d: &Driver, f: &cuda_sim::Function, c: &LaunchConfig) -> Outcome {
    let a = &d.config.arch;
    let shared = f.static_shared().saturating_add(c.dynamic_shared);
    let each = a.occupancy(c.block.iter().product(), c.registers.unwrap_or(f.registers()), shared).0;
    let (room, blocks) =
        (u64::from(each) * u64::from(a.multiprocessors), c.grid.iter().map(|&g| u64::from(g)).product());
    if room < blocks {
        let text = format!("kernel {}: {blocks} cooperating blocks, but {room} fit on {}", f.name(), a.name);
        return Err(failure(COOPERATIVE_LAUNCH_TOO_LARGE, text));
    }
    Ok(())
}

fn config(grid: [c_uint; 3], block: [c_uint; 3], shared: c_uint) -> LaunchConfig {
    LaunchConfig { dynamic_shared: shared, ..LaunchConfig::new(grid, block) }
}

driver_calls! {
    fn cuLaunchKernel(
        function: Handle, gx: c_uint, gy: c_uint, gz: c_uint, bx: c_uint, by: c_uint, bz: c_uint, shared: c_uint,
        stream: Handle, values: In<In<u8>>, extra: In<usize>,
    ) {
        launch(config([gx, gy, gz], [bx, by, bz], shared), stream, function, values, extra, false)
    }

    fn cuLaunchCooperativeKernel(
        function: Handle, gx: c_uint, gy: c_uint, gz: c_uint, bx: c_uint, by: c_uint, bz: c_uint, shared: c_uint,
        stream: Handle, values: In<In<u8>>,
    ) {
        launch(config([gx, gy, gz], [bx, by, bz], shared), stream, function, values, In::null(), true)
    }

    fn cuLaunchKernelEx(given: In<Config>, function: Handle, values: In<In<u8>>, extra: In<usize>) {
        let given = given.at(0)?;
        let mut c = config(given.grid, given.block, given.shared);
        let mut all = false;
        for attribute in In::new(given.attributes).take(given.count.min(64) as usize)? {
            match attribute.id {
                2 => all = attribute.value[0] != 0,
                4 => c.cluster = [attribute.value[0], attribute.value[1], attribute.value[2]],
                // Hints: caching, scheduling, priority, overlap with the launch before (work runs in order anyway).
                0 | 1 | 3 | 5 | 6 | 8 | 9 | 10 | 14 => {}
                id => return Err(failure(NOT_SUPPORTED, format!("launch attribute {id} is not simulated"))),
            }
        }
        launch(c, given.stream, function, values, extra, all)
    }

    fn cuLaunch(_function: Handle) {
        Err(failure(NOT_SUPPORTED, "cuLaunch is long deprecated: use cuLaunchKernel"))
    }

    fn cuLaunchCooperativeKernelMultiDevice(_list: In<c_void>, _count: c_uint, _flags: c_uint) {
        Err(failure(NOT_SUPPORTED, "there is one simulated device"))
    }
}
