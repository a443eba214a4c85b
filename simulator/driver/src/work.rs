//! Work on streams: copies, fills, launches. It runs at once, or is written down while its stream is captured.

use crate::abi::*;
use crate::report;
use crate::state::{Driver, Handle};
use crate::{capture, launch};
use cuda_sim::LaunchConfig;
use std::ffi::c_void;

/// A function of the program, called in stream order.
pub type HostFunction = extern "C" fn(*mut c_void);

/// One piece of work.
#[derive(Clone)]
pub enum Work {
    /// A kernel with its parameters.
    Launch {
        /// The kernel.
        function: cuda_sim::Function,
        /// Its shape.
        config: LaunchConfig,
        /// Its parameter buffer.
        params: Vec<u8>,
    },
    /// Host to device.
    ToDevice {
        /// Device address.
        to: u64,
        /// Host address.
        from: Host,
        /// Length.
        bytes: usize,
    },
    /// Device to host.
    ToHost {
        /// Host address.
        to: Host,
        /// Device address.
        from: u64,
        /// Length.
        bytes: usize,
    },
    /// Device to device.
    Copy {
        /// Target.
        to: u64,
        /// Source.
        from: u64,
        /// Length.
        bytes: usize,
    },
    /// `rows` times `count` repetitions of a pattern, `pitch` bytes apart.
    Fill {
        /// First byte.
        to: u64,
        /// The pattern's 1, 2 or 4 bytes, little-endian.
        pattern: u32,
        /// Length of the pattern.
        size: usize,
        /// Repetitions in a row.
        count: usize,
        /// Rows.
        rows: usize,
        /// Bytes from row to row.
        pitch: usize,
    },
    /// Memory of a graph that is allocated or freed there: its contents are gone.
    Forget {
        /// First byte.
        address: u64,
        /// Length.
        bytes: u64,
    },
    /// Memory to free.
    Free(u64),
    /// A function of the program.
    Call(HostFunction, Host),
}

/// Does work in stream order: now, or later if the stream is captured. `stream` 0 is the legacy stream.
pub fn submit(d: &Driver, stream: Handle, work: Work) -> Outcome {
    let mut state = d.ready()?;
    match capture::of(&mut state, stream)? {
        Some(capture) => {
            capture.add(stream, work);
            Ok(())
        }
        None => {
            // The table is free again, for a callback may call the driver and a launch may take long.
            drop(state);
            run(d, &work)
        }
    }
}

/// Does work now.
pub fn run(d: &Driver, work: &Work) -> Outcome {
    match work {
        Work::Launch { function, config, params } => return launch::run(d, function, config, params),
        &Work::ToDevice { to, from, bytes } => d.device.write(to, from.bytes(bytes)?)?,
        &Work::ToHost { to, from, bytes } => {
            if d.config.unwritten_copies
                && let Some(first) = d.device.first_unwritten(from, bytes as u64)?
            {
                report::unwritten_copy(d, from, bytes as u64, first);
            }
            d.device.read(from, to.bytes_mut(bytes)?)?;
        }
        &Work::Copy { to, from, bytes } => d.device.copy(to, from, bytes as u64)?,
        &Work::Fill { to, pattern, size, count, rows, pitch } => {
            let pattern = pattern.to_le_bytes();
            let width = count.saturating_mul(size);
            if rows > 1 && pitch < width {
                return Err(failure(INVALID_VALUE, format!("rows of {width} bytes overlap at a pitch of {pitch}")));
            }
            if !to.is_multiple_of(size as u64) || rows > 1 && !pitch.is_multiple_of(size) {
                return Err(failure(INVALID_VALUE, format!("{to:#x} or pitch {pitch} is not a multiple of {size}")));
            }
            // All rows or none.
            let last = to.saturating_add((rows.saturating_sub(1) as u64).saturating_mul(pitch as u64));
            if rows > 1 && d.device.address_range(to).is_none_or(|(base, n)| last >= base + n) {
                return Err(failure(
                    INVALID_VALUE,
                    format!("{rows} rows at {to:#x} and pitch {pitch} leave the allocation"),
                ));
            }
            for row in (0..rows as u64).rev() {
                d.device.memset(to + row * pitch as u64, &pattern[..size], count as u64)?;
            }
        }
        &Work::Forget { address, bytes } => d.device.poison(address, bytes)?,
        &Work::Free(address) => {
            d.device.free(address)?;
            d.lock().give_back_to_pool(address);
        }
        &Work::Call(function, data) => function(std::ptr::with_exposed_provenance_mut(data.address())),
    }
    Ok(())
}
