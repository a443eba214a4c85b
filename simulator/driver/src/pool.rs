//! Memory pools: counts of what was allocated from each. All take from the device's one memory.

use crate::abi::*;
use crate::device::check;
use crate::state::{Handle, Pool, State, driver, no_such};
use std::collections::BTreeMap;
use std::ffi::{c_int, c_uint};

fn new(state: &mut State) -> Handle {
    let handle = state.handle();
    let settings = BTreeMap::from([(1, 1), (2, 1), (3, 1), (4, 0)]);
    state.pools.insert(handle, Pool { settings, ..Pool::default() });
    handle
}

fn default(state: &mut State) -> Handle {
    match state.default_pool {
        Some(pool) => pool,
        None => {
            let pool = new(state);
            state.default_pool = Some(pool);
            pool
        }
    }
}

/// The pool that `cuMemAllocAsync` takes from.
pub fn current(state: &mut State) -> Handle {
    match state.current_pool {
        Some(pool) => pool,
        None => default(state),
    }
}

impl State {
    /// Counts memory as in use.
    pub fn take_from_pool(&mut self, pool: Handle, address: u64, bytes: u64) {
        self.pooled.insert(address, (pool, bytes));
        if let Some(pool) = self.pools.get_mut(&pool) {
            pool.used += bytes;
            pool.highs = pool.highs.map(|high| high.max(pool.used));
        }
    }

    /// Counts memory as free again, if it came from a pool that still exists.
    pub fn give_back_to_pool(&mut self, address: u64) {
        if let Some((pool, bytes)) = self.pooled.remove(&address)
            && let Some(pool) = self.pools.get_mut(&pool)
        {
            pool.used -= bytes;
        }
    }
}

driver_calls! {
    fn cuDeviceGetDefaultMemPool(pool: Out<Handle>, device: c_int) {
        check(device)?;
        pool.set(default(&mut driver()?.lock()))
    }

    fn cuDeviceGetMemPool(pool: Out<Handle>, device: c_int) {
        check(device)?;
        pool.set(current(&mut driver()?.lock()))
    }

    fn cuDeviceSetMemPool(device: c_int, pool: Handle) {
        check(device)?;
        let mut state = driver()?.lock();
        if !state.pools.contains_key(&pool) {
            return Err(no_such("memory pool", pool));
        }
        state.current_pool = Some(pool);
        Ok(())
    }

    fn cuMemPoolCreate(out: Out<Handle>, properties: In<u8>) {
        let mut state = driver()?.lock();
        if properties.is_null() || out.address() == 0 {
            return Err(failure(INVALID_VALUE, "an argument is a null pointer"));
        }
        out.set(new(&mut state))
    }

    fn cuMemPoolDestroy(pool: Handle) {
        let mut state = driver()?.lock();
        if state.default_pool == Some(pool) {
            return Err(failure(INVALID_VALUE, "the default pool cannot be destroyed"));
        }
        if state.current_pool == Some(pool) {
            state.current_pool = None;
        }
        state.pools.remove(&pool).map(drop).ok_or_else(|| no_such("memory pool", pool))
    }

    fn cuMemPoolTrimTo(pool: Handle, _keep: usize) {
        let state = driver()?.lock();
        state.pools.get(&pool).map(|_| ()).ok_or_else(|| no_such("memory pool", pool))
    }

    fn cuMemPoolSetAttribute(pool: Handle, attribute: c_uint, value: In<u32>) {
        let mut state = driver()?.lock();
        let pool = state.pools.get_mut(&pool).ok_or_else(|| no_such("memory pool", pool))?;
        let wide = || -> Outcome<u64> { Ok(u64::from(value.at(0)?) | u64::from(value.at(1)?) << 32) };
        match attribute {
            1..=3 => pool.settings.insert(attribute, value.at(0)?.into()),
            4 => pool.settings.insert(attribute, wide()?),
            6 | 8 => match wide()? {
                0 => {
                    pool.highs[usize::from(attribute == 6)] = pool.used;
                    None
                }
                n => return Err(failure(INVALID_VALUE, format!("pool attribute {attribute} can only be reset to 0, not {n}"))),
            },
            _ => return Err(failure(INVALID_VALUE, format!("pool attribute {attribute} cannot be set"))),
        };
        Ok(())
    }

    fn cuMemPoolGetAttribute(pool: Handle, attribute: c_uint, out: Out<u64>) {
        let state = driver()?.lock();
        let pool = state.pools.get(&pool).ok_or_else(|| no_such("memory pool", pool))?;
        let setting = pool.settings.get(&attribute).copied().unwrap_or(0);
        match attribute {
            1..=3 => out.cast::<u32>().set(setting as u32),
            4 => out.set(setting),
            5 | 7 => out.set(pool.used),
            6 | 8 => out.set(pool.highs[usize::from(attribute == 6)]),
            _ => Err(failure(INVALID_VALUE, format!("pool attribute {attribute} is not known to the simulator"))),
        }
    }
}
