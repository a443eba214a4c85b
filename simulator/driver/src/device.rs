//! Initialisation, versions and the one device.

use crate::abi::*;
use crate::state::{self, driver};
use cuda_sim::{Arch, arch};
use std::ffi::{c_char, c_int, c_uint};

/// The CUDA version that the driver claims: 13.0.
pub const VERSION: c_int = 13_000;

/// The device's name: says at first sight that no GPU is at work.
pub fn name(arch: &Arch) -> String {
    format!("CUDA simulator ({}, like {}; runs on the CPU)", arch.name, arch.card)
}

pub(crate) fn check(device: c_int) -> Outcome {
    driver()?;
    if device == 0 {
        return Ok(());
    }
    Err(failure(INVALID_DEVICE, format!("device {device} does not exist: the simulator has device 0 only")))
}

fn uuid() -> Outcome<[u8; 16]> {
    let mut id = *b"cuda-sim:sm_000\0";
    let text = driver()?.config.arch.name.as_bytes();
    id[9..9 + text.len().min(7)].copy_from_slice(&text[..text.len().min(7)]);
    Ok(id)
}

/// `CUdevice_attribute` by number; `None` where the simulator has no answer.
pub fn attribute(a: &Arch, id: c_int) -> Option<c_int> {
    let int = |n: u64| c_int::try_from(n).unwrap_or(c_int::MAX);
    let since_90 = c_int::from(a.capability >= (9, 0));
    Some(match id {
        1..=3 => arch::MAX_THREADS_PER_BLOCK as c_int,
        4 => 64,
        5 => c_int::MAX,
        6 | 7 => 65_535,
        8 => arch::SHARED_DEFAULT as c_int,
        9 => 65_536, // constant memory
        10 => arch::WARP as c_int,
        11 => c_int::MAX, // pitch
        12 | 82 => int(a.registers_per_sm.into()),
        13 => int(a.clock_khz.into()),
        14 => 512, // texture alignment
        15 => 1,   // copies overlap
        16 => int(a.multiprocessors.into()),
        17..=20 => 0, // no watchdog, not integrated, no mapped host memory, default mode
        21..=29 | 42..=49 | 52..=74 | 77 => 0, // no textures or surfaces
        30 => 512,
        31 => 1,           // concurrent kernels
        32 => 0,           // ECC
        33 | 34 | 50 => 0, // PCI address
        35 => 0,           // TCC
        36 => int(a.memory_clock_khz.into()),
        37 => int(a.memory_bus_bits.into()),
        38 => int(a.l2_bytes.into()),
        39 => int(a.threads_per_sm.into()),
        40 => 2, // copy engines
        41 => 1, // unified addressing
        51 => 32,
        75 => a.capability.0 as c_int,
        76 => a.capability.1 as c_int,
        78 => 1,      // stream priorities
        79 | 80 => 1, // L1 for global and local
        81 => int(a.shared_per_sm.into()),
        83..=86 | 88..=89 => 0, // managed memory, multi-GPU boards, host atomics, pageable access
        87 => {
            if a.capability.1 == 0 && a.capability.0 < 12 {
                2
            } else {
                64
            }
        }
        90 => 1,      // preemption
        91..=94 => 0, // registered pointers on the device, stream memory operations
        95 => 1,      // cooperative launch
        96 => 0,
        97 => int(a.shared_per_block_optin.into()),
        98 => 0,
        99 => 1,                                // host memory can be registered
        100..=105 | 107 | 110 | 112..=114 => 0, // page tables, virtual memory, handles, compression, sparse arrays
        106 => int(a.blocks_per_sm.into()),
        108 | 109 => 0, // persisting L2
        111 => int(a.shared_reserved.into()),
        115 => 1, // memory pools
        116..=119 => 0,
        120 => 0, // clusters of more than one block are not simulated
        121..=126 => 0,
        127 => since_90, // tensor maps
        128..=134 => 0,
        _ => return None,
    })
}

driver_calls! {
    fn cuInit(flags: c_uint) {
        if flags != 0 {
            return Err(failure(INVALID_VALUE, format!("flags {flags} must be 0")));
        }
        state::init()
    }

    fn cuDriverGetVersion(version: Out<c_int>) {
        version.set(VERSION)
    }

    fn cuDeviceGet(device: Out<c_int>, ordinal: c_int) {
        check(ordinal)?;
        device.set(0)
    }

    fn cuDeviceGetCount(count: Out<c_int>) {
        driver()?;
        count.set(1)
    }

    fn cuDeviceGetName(out: Out<c_char>, len: c_int, device: c_int) {
        check(device)?;
        let Some(room) = usize::try_from(len).ok().filter(|&n| n > 0) else {
            return Err(failure(INVALID_VALUE, format!("a name of {len} bytes has no room for its end")));
        };
        let name = name(&driver()?.config.arch);
        let mut bytes: Vec<c_char> = name.bytes().take(room - 1).map(|b| b as c_char).collect();
        bytes.push(0);
        out.set_all(&bytes)
    }

    fn cuDeviceGetUuid(id: Out<[u8; 16]>, device: c_int) {
        check(device)?;
        id.set(uuid()?)
    }

    fn cuDeviceGetUuid_v2(id: Out<[u8; 16]>, device: c_int) {
        check(device)?;
        id.set(uuid()?)
    }

    fn cuDeviceTotalMem_v2(bytes: Out<usize>, device: c_int) {
        check(device)?;
        bytes.set(driver()?.device.mem_info().1 as usize)
    }

    fn cuDeviceGetAttribute(value: Out<c_int>, id: c_int, device: c_int) {
        check(device)?;
        match attribute(&driver()?.config.arch, id) {
            Some(v) => value.set(v),
            None => Err(failure(INVALID_VALUE, format!("device attribute {id} is not known to the simulator"))),
        }
    }

    fn cuDeviceComputeCapability(major: Out<c_int>, minor: Out<c_int>, device: c_int) {
        check(device)?;
        let (a, b) = driver()?.config.arch.capability;
        major.set(a as c_int)?;
        minor.set(b as c_int)
    }

    fn cuDeviceCanAccessPeer(can: Out<c_int>, device: c_int, peer: c_int) {
        check(device)?;
        check(peer)?;
        can.set(0)
    }

    fn cuDeviceGetPCIBusId(out: Out<c_char>, len: c_int, device: c_int) {
        check(device)?;
        let bytes: Vec<c_char> = b"0000:00:00.0\0".iter().map(|&b| b as c_char).collect();
        if usize::try_from(len).is_ok_and(|n| n >= bytes.len()) {
            return out.set_all(&bytes);
        }
        Err(failure(INVALID_VALUE, format!("a PCI address has 13 bytes, there is room for {len}")))
    }

    fn cuProfilerStart() {
        driver().map(|_| ())
    }

    fn cuProfilerStop() {
        driver().map(|_| ())
    }
}
