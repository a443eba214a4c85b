//! Occupancy: how many blocks of a kernel a multiprocessor holds.

use crate::abi::*;
use crate::launch::Config;
use crate::state::{Driver, Handle, driver, no_such};
use cuda_sim::arch::{MAX_THREADS_PER_BLOCK, WARP};
use std::ffi::{c_int, c_uint};

type SharedForBlock = extern "C" fn(c_int) -> usize;

/// The kernel and its registers.
fn kernel(d: &Driver, function: Handle) -> Outcome<(cuda_sim::Function, u32)> {
    let state = d.ready()?;
    let f = state.functions.get(&function).ok_or_else(|| no_such("function", function))?;
    let registers = d.config.registers.get(f.program.name()).copied();
    Ok((f.program.clone(), registers.unwrap_or(f.program.registers())))
}

fn positive(threads: c_int) -> Outcome<u32> {
    let ok = u32::try_from(threads).ok().filter(|t| *t > 0);
    ok.ok_or_else(|| failure(INVALID_VALUE, format!("a block of {threads} threads does not exist")))
}

fn blocks(d: &Driver, f: &cuda_sim::Function, registers: u32, threads: u32, dynamic: usize) -> u32 {
    let a = &d.config.arch;
    let shared = u64::from(f.static_shared()).saturating_add(dynamic as u64);
    if threads > f.max_threads() || shared > u64::from(a.shared_per_block_optin) {
        return 0;
    }
    a.occupancy(threads, registers, shared as u32).0
}

fn per_multiprocessor(out: Out<c_int>, function: Handle, threads: c_int, dynamic: usize) -> Outcome {
    let d = driver()?;
    let (f, registers) = kernel(d, function)?;
    out.set(blocks(d, &f, registers, positive(threads)?, dynamic) as c_int)
}

/// The largest block among those that keep the most threads resident, and the least grid that fills the device.
fn best_block(
    grid: Out<c_int>,
    block: Out<c_int>,
    function: Handle,
    shared: Option<SharedForBlock>,
    dynamic: usize,
    limit: c_int,
) -> Outcome {
    let d = driver()?;
    let (f, registers) = kernel(d, function)?;
    let limit = match u32::try_from(limit) {
        Ok(0) | Err(_) => MAX_THREADS_PER_BLOCK,
        Ok(n) => n,
    };
    let most = f.max_threads().min(limit);
    let mut best = (0, 0, 0);
    for threads in (1..=most.div_ceil(WARP)).map(|w| (w * WARP).min(most)) {
        let dynamic = shared.map_or(dynamic, |shared| shared(threads as c_int));
        let n = blocks(d, &f, registers, threads, dynamic);
        best = best.max((n * threads, threads, n));
    }
    grid.set((best.2 * d.config.arch.multiprocessors) as c_int)?;
    block.set(best.1 as c_int)
}

driver_calls! {
    fn cuOccupancyMaxActiveBlocksPerMultiprocessor(out: Out<c_int>, function: Handle, threads: c_int, dynamic: usize) {
        per_multiprocessor(out, function, threads, dynamic)
    }

    fn cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
        out: Out<c_int>, function: Handle, threads: c_int, dynamic: usize, _flags: c_uint,
    ) {
        per_multiprocessor(out, function, threads, dynamic)
    }

    fn cuOccupancyMaxPotentialBlockSize(
        grid: Out<c_int>, block: Out<c_int>, function: Handle, shared: Option<SharedForBlock>, dynamic: usize,
        limit: c_int,
    ) {
        best_block(grid, block, function, shared, dynamic, limit)
    }

    fn cuOccupancyMaxPotentialBlockSizeWithFlags(
        grid: Out<c_int>, block: Out<c_int>, function: Handle, shared: Option<SharedForBlock>, dynamic: usize,
        limit: c_int, _flags: c_uint,
    ) {
        best_block(grid, block, function, shared, dynamic, limit)
    }

    fn cuOccupancyAvailableDynamicSMemPerBlock(out: Out<usize>, function: Handle, count: c_int, threads: c_int) {
        let d = driver()?;
        let (f, registers) = kernel(d, function)?;
        let (count, threads) = (positive(count)?, positive(threads)?);
        if blocks(d, &f, registers, threads, 0) < count {
            return out.set(0);
        }
        let a = &d.config.arch;
        let each = (a.shared_per_sm / count).saturating_sub(a.shared_reserved) / 128 * 128;
        out.set(each.min(a.shared_per_block_optin).saturating_sub(f.static_shared()) as usize)
    }

    fn cuOccupancyMaxPotentialClusterSize(out: Out<c_int>, function: Handle, _config: In<Config>) {
        kernel(driver()?, function)?;
        out.set(1)
    }

    fn cuOccupancyMaxActiveClusters(out: Out<c_int>, function: Handle, config: In<Config>) {
        let d = driver()?;
        let (f, registers) = kernel(d, function)?;
        let (threads, shared) = config.at(0)?.threads_and_shared();
        let n = blocks(d, &f, registers, threads.max(1), shared as usize);
        out.set((n * d.config.arch.multiprocessors) as c_int)
    }
}
