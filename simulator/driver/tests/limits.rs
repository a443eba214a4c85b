//! What each GPU refuses to launch, with the driver's codes. The limits here are those of the CUDA Programming Guide's
//! table "Technical Specifications per Compute Capability", written down a second time; the rule for registers is that of
//! the toolkit's `cuda_occupancy.h`; the codes are those of the manual of cuLaunchKernel and of `CUresult`.

mod common;

use common::{child, is_child};
use cudarc::driver::sys::{self, CUfunction_attribute as FunctionAttribute, CUresult};
use cudarc::driver::{CudaContext, CudaModule};
use std::ffi::c_void;
use std::sync::Arc;

const OK: CUresult = CUresult::CUDA_SUCCESS;
/// A configuration that no launch of this kernel on this GPU may have.
const INVALID: CUresult = CUresult::CUDA_ERROR_INVALID_VALUE;
/// "Too many threads for the kernel's register count."
const RESOURCES: CUresult = CUresult::CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES;

/// A row of the guide's table, in its units.
struct Limits {
    arch: &'static str,
    resident_blocks: u32,
    resident_warps: u32,
    shared_per_multiprocessor_kb: u32,
    shared_per_block_kb: u32,
}

const TABLE: [Limits; 5] = [
    Limits {
        arch: "sm_80",
        resident_blocks: 32,
        resident_warps: 64,
        shared_per_multiprocessor_kb: 164,
        shared_per_block_kb: 163,
    },
    Limits {
        arch: "sm_86",
        resident_blocks: 16,
        resident_warps: 48,
        shared_per_multiprocessor_kb: 100,
        shared_per_block_kb: 99,
    },
    Limits {
        arch: "sm_89",
        resident_blocks: 24,
        resident_warps: 48,
        shared_per_multiprocessor_kb: 100,
        shared_per_block_kb: 99,
    },
    Limits {
        arch: "sm_90",
        resident_blocks: 32,
        resident_warps: 64,
        shared_per_multiprocessor_kb: 228,
        shared_per_block_kb: 227,
    },
    Limits {
        arch: "sm_120",
        resident_blocks: 24,
        resident_warps: 48,
        shared_per_multiprocessor_kb: 100,
        shared_per_block_kb: 99,
    },
];

/// Each kernel counts its threads in `out` and writes the last byte of its `dynamic` bytes of shared memory.
fn ptx(arch: &str) -> String {
    let kernel = |name: &str, directives: &str, fixed: u32| {
        let shared = if fixed == 0 { String::new() } else { format!(".shared .align 4 .b8 fixed_{name}[{fixed}];") };
        let touch = if fixed == 0 { String::new() } else { format!("st.shared.u8 [fixed_{name}+{}], %h0;", fixed - 1) };
        format!(
            ".visible .entry {name}(.param .u64 out, .param .u32 dynamic) {directives} {{ {shared}\n\
             .reg .pred %p<2>; .reg .b16 %h<2>; .reg .b32 %r<4>; .reg .b64 %rd<2>;\n\
             ld.param.u64 %rd0, [out]; ld.param.u32 %r0, [dynamic]; mov.u16 %h0, 1; {touch}\n\
             atom.global.add.u32 %r1, [%rd0], 1; setp.eq.u32 %p0, %r0, 0; @%p0 bra DONE;\n\
             mov.u32 %r2, space; add.u32 %r2, %r2, %r0; st.shared.u8 [%r2+-1], %h0; DONE: ret; }}\n"
        )
    };
    [
        format!(".version 8.7\n.target {arch}\n.address_size 64\n.extern .shared .align 16 .b8 space[];\n"),
        kernel("plain", "", 0),
        kernel("fixed", "", 32 * 1024),
        kernel("bounded", ".maxntid 128, 1, 1", 0),
        kernel("required", ".reqntid 8, 4, 2", 0),
        kernel("limited", ".maxnreg 32", 0),
        REGISTERS.map(|(n, _)| kernel(&format!("registers_{n}"), "", 0)).concat(),
    ]
    .concat()
}

/// Registers of a thread by the assembler's log, and the most threads of a block that 64K registers are enough for:
/// registers come in 256s to a warp, and are counted as if the block's warps were a multiple of four.
const REGISTERS: [(u32, u32); 7] = [(32, 1024), (64, 1024), (65, 896), (80, 768), (128, 512), (168, 384), (255, 256)];

struct Launcher {
    context: Arc<CudaContext>,
    module: Arc<CudaModule>,
    out: u64,
}

impl Launcher {
    fn function(&self, kernel: &str) -> sys::CUfunction {
        self.module.load_function(kernel).unwrap().cu_function()
    }

    fn raw(&self, kernel: &str, grid: [u32; 3], block: [u32; 3], shared: u32, stream: sys::CUstream) -> CUresult {
        let mut values: [*mut c_void; 2] =
            [(&raw const self.out).cast_mut().cast(), (&raw const shared).cast_mut().cast()];
        let ([gx, gy, gz], [bx, by, bz], values) = (grid, block, values.as_mut_ptr());
        let (f, none) = (self.function(kernel), std::ptr::null_mut());
        // SAFETY: the values are the kernel's parameters in order.
        unsafe { sys::cuLaunchKernel(f, gx, gy, gz, bx, by, bz, shared, stream, values, none) }
    }

    /// Launches and counts the threads that ran, which must be all or none.
    fn launch(&self, kernel: &str, grid: [u32; 3], block: [u32; 3], shared: u32) -> CUresult {
        let mut ran = 0u32;
        // SAFETY: `out` is one word of device memory, `ran` one of the host's.
        unsafe {
            assert_eq!(sys::cuMemsetD32_v2(self.out, 0, 1), OK);
            let result = self.raw(kernel, grid, block, shared, std::ptr::null_mut());
            assert_eq!(sys::cuMemcpyDtoH_v2((&raw mut ran).cast(), self.out, 4), OK);
            let all = grid.iter().chain(&block).fold(1u32, |n, &d| n.wrapping_mul(d));
            assert_eq!(ran, if result == OK { all } else { 0 }, "{kernel} {grid:?} {block:?} {shared}: {result:?}");
            result
        }
    }

    fn allow(&self, kernel: &str, bytes: i32) -> CUresult {
        let id = FunctionAttribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: the function is live.
        unsafe { sys::cuFuncSetAttribute(self.function(kernel), id, bytes) }
    }

    fn attribute(&self, kernel: &str, id: FunctionAttribute) -> i32 {
        let mut value = -1;
        // SAFETY: the function is live and `value` outlives the call.
        assert_eq!(unsafe { sys::cuFuncGetAttribute(&mut value, id, self.function(kernel)) }, OK);
        value
    }
}

fn dimensions(l: &Launcher) {
    let one = [1, 1, 1];
    for (grid, block, want) in [
        (one, [1024, 1, 1], OK),
        (one, [1, 1024, 1], OK),
        (one, [1, 1, 64], OK),
        (one, [16, 1, 64], OK),
        (one, [1025, 1, 1], INVALID),
        (one, [1, 1025, 1], INVALID),
        (one, [1, 1, 65], INVALID),
        (one, [32, 33, 1], INVALID),
        (one, [16, 2, 64], INVALID),
        // Products that are small, or zero, only modulo 2^32.
        (one, [1 << 16, 1 << 16, 1], INVALID),
        (one, [u32::MAX, 1, 1], INVALID),
        ([0, 1, 1], one, INVALID),
        ([1, 0, 1], one, INVALID),
        ([1, 1, 0], one, INVALID),
        (one, [0, 1, 1], INVALID),
        (one, [1, 0, 1], INVALID),
        (one, [1, 1, 0], INVALID),
        ([1, 65_535, 1], one, OK),
        ([1, 1, 65_535], one, OK),
        ([70_000, 1, 1], one, OK),
        ([1, 65_536, 1], one, INVALID),
        ([1, 1, 65_536], one, INVALID),
        ([1 << 31, 1, 1], one, INVALID),
    ] {
        assert_eq!(l.launch("plain", grid, block, 0), want, "grid {grid:?} block {block:?}");
    }
    // The largest grid would take hours: it is captured, which checks it, and not run.
    let stream = l.context.new_stream().unwrap();
    stream.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED).unwrap();
    let s = stream.cu_stream();
    assert_eq!(l.raw("plain", [(1 << 31) - 1, 65_535, 65_535], [1024, 1, 1], 0, s), OK);
    assert_eq!(l.raw("plain", [1 << 31, 1, 1], one, 0, s), INVALID);
    let mut graph = std::ptr::null_mut();
    // SAFETY: ends the capture that was begun above.
    unsafe {
        assert_eq!(sys::cuStreamEndCapture(s, &mut graph), OK);
        assert_eq!(sys::cuGraphDestroy(graph), OK);
    }
}

fn declared_bounds(l: &Launcher) {
    let one = [1, 1, 1];
    for (kernel, block, want) in [
        ("bounded", [128, 1, 1], OK),
        ("bounded", [4, 8, 4], OK),
        ("bounded", [129, 1, 1], INVALID),
        ("required", [8, 4, 2], OK),
        ("required", [64, 1, 1], INVALID),
        ("required", [4, 8, 2], INVALID),
        // A bound on registers refuses no block by itself.
        ("limited", [1024, 1, 1], OK),
    ] {
        assert_eq!(l.launch(kernel, one, block, 0), want, "{kernel} {block:?}");
    }
    let most = |kernel| l.attribute(kernel, FunctionAttribute::CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK);
    assert_eq!(["plain", "bounded", "required", "limited"].map(most), [1024, 128, 64, 1024]);
}

fn shared_memory(l: &Launcher, limits: &Limits) {
    let (one, warp, kb) = ([1, 1, 1], [32, 1, 1], 1024);
    let most = limits.shared_per_block_kb * kb;
    let default = |kernel| l.attribute(kernel, FunctionAttribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES);
    assert_eq!(["plain", "fixed"].map(default), [48 * 1024, 16 * 1024]);
    for (kernel, fixed) in [("plain", 0), ("fixed", 32 * kb)] {
        // 48 KB with what is static, without opting in.
        assert_eq!(l.launch(kernel, one, warp, 48 * kb - fixed), OK);
        assert_eq!(l.launch(kernel, one, warp, 48 * kb - fixed + 1), INVALID);
        assert_eq!(l.launch(kernel, one, warp, most - fixed), INVALID);
        // The most that opting in gives.
        assert_eq!(l.allow(kernel, (most - fixed) as i32 + 1), INVALID);
        assert_eq!(l.allow(kernel, -1), INVALID);
        assert_eq!(l.allow(kernel, (most - fixed) as i32), OK);
        assert_eq!(l.launch(kernel, one, warp, most - fixed), OK);
        assert_eq!(l.launch(kernel, one, warp, most - fixed + 1), INVALID);
        assert_eq!(l.launch(kernel, one, warp, u32::MAX), INVALID);
        // Less than before is a limit as well.
        assert_eq!(l.allow(kernel, 1000), OK);
        assert_eq!(l.launch(kernel, one, warp, 1000), OK);
        assert_eq!(l.launch(kernel, one, warp, 1001), INVALID);
    }
    // Static shared memory has no opt-in: the assembler refuses more than 48 KB, unless the target is sm_90a alone.
    let load = |target: &str, bytes| {
        let header = format!(".version 8.7\n.target {target}\n.address_size 64\n");
        let text =
            format!("{header}.visible .entry k() {{ .shared .align 4 .b8 s[{bytes}]; st.shared.u8 [s], 1; ret; }}");
        l.context.load_module(text.into()).map(|_| ()).map_err(|e| e.0)
    };
    let refused = Err(CUresult::CUDA_ERROR_INVALID_PTX);
    assert_eq!([48 * kb, 48 * kb + 4].map(|n| load(limits.arch, n)), [Ok(()), refused]);
    if limits.arch == "sm_90" {
        assert_eq!([most, most + 4].map(|n| load("sm_90a", n)), [Ok(()), refused]);
    }
}

fn registers(l: &Launcher) {
    for (n, most) in REGISTERS {
        let kernel = format!("registers_{n}");
        assert_eq!(l.launch(&kernel, [1, 1, 1], [most, 1, 1], 0), OK, "{n} registers, {most} threads");
        if most < 1024 {
            assert_eq!(l.launch(&kernel, [1, 1, 1], [most + 1, 1, 1], 0), RESOURCES, "{n} registers");
        }
        let attribute = |id| l.attribute(&kernel, id);
        assert_eq!(attribute(FunctionAttribute::CU_FUNC_ATTRIBUTE_NUM_REGS), n as i32);
        assert_eq!(attribute(FunctionAttribute::CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK), most as i32);
    }
}

/// Blocks of a multiprocessor, from the table: by blocks, by warps, by registers, by shared memory.
fn occupancy(l: &Launcher, limits: &Limits) {
    let resident = |kernel: &str, threads, shared| {
        let mut n = -1;
        let f = l.function(kernel);
        // SAFETY: the function is live and `n` outlives the call.
        assert_eq!(unsafe { sys::cuOccupancyMaxActiveBlocksPerMultiprocessor(&mut n, f, threads, shared) }, OK);
        n as u32
    };
    let (blocks, warps) = (limits.resident_blocks, limits.resident_warps);
    assert_eq!(resident("registers_32", 32, 0), blocks);
    assert_eq!(resident("registers_32", 1024, 0), warps / 32);
    assert_eq!(resident("registers_32", 96, 0), blocks.min(warps / 3));
    // 168 registers are 5376 for a warp: three warps in each quarter of 16K.
    assert_eq!(resident("registers_168", 128, 0), 3);
    assert_eq!(resident("registers_168", 32, 0), 12);
    // 80 registers are 2560: six warps in each quarter, though 64K would hold 25.
    assert_eq!(resident("registers_80", 160, 0), 24 / 5);
    // One KB of a block's shared memory is the system's.
    let shared = limits.shared_per_multiprocessor_kb;
    for kb in [10, 24, 48] {
        assert_eq!(resident("registers_32", 32, kb * 1024), blocks.min(shared / (kb as u32 + 1)), "{kb} KB");
    }
    let most = limits.shared_per_block_kb as usize * 1024;
    assert_eq!([most, most + 1].map(|n| resident("registers_32", 32, n)), [1, 0]);
}

#[test]
fn each_gpu_refuses_what_it_cannot_hold() {
    let test = "each_gpu_refuses_what_it_cannot_hold";
    if is_child() {
        let arch = std::env::var("CUDA_SIM_ARCH").unwrap();
        let limits = TABLE.iter().find(|l| l.arch == arch).unwrap();
        let context = CudaContext::new(0).unwrap();
        context.bind_to_thread().unwrap();
        let mut out = 0;
        // SAFETY: `out` outlives the call.
        assert_eq!(unsafe { sys::cuMemAlloc_v2(&mut out, 4) }, OK);
        let launcher = Launcher { module: context.load_module(ptx(&arch).into()).unwrap(), context, out };
        dimensions(&launcher);
        declared_bounds(&launcher);
        registers(&launcher);
        occupancy(&launcher, limits);
        shared_memory(&launcher, limits);
        // SAFETY: allocated above.
        assert_eq!(unsafe { sys::cuMemFree_v2(out) }, OK, "a refused launch ended the context");
        return;
    }
    let log = std::env::temp_dir().join(format!("cuda-sim-limits-{}.log", std::process::id()));
    for limits in &TABLE {
        let entries = REGISTERS.map(|(n, _)| {
            let arch = limits.arch;
            format!(
                "ptxas info : Compiling entry function 'registers_{n}' for '{arch}'\nptxas info : Used {n} registers\n"
            )
        });
        std::fs::write(&log, entries.concat()).unwrap();
        let out = child(test, &[("CUDA_SIM_ARCH", limits.arch), ("CUDA_SIM_PTXAS_LOG", log.to_str().unwrap())], true);
        let stderr = String::from_utf8_lossy(&out.stderr);
        assert!(out.status.success(), "{}: {}\n{stderr}", limits.arch, String::from_utf8_lossy(&out.stdout));
    }
    std::fs::remove_file(&log).unwrap();
}

#[test]
fn parameters_have_a_limit_and_are_read_where_they_lie() {
    let test = "parameters_have_a_limit_and_are_read_where_they_lie";
    if is_child() {
        let context = CudaContext::new(0).unwrap();
        let stream = context.default_stream();
        let text = |bytes: u32| {
            format!(
                ".version 8.7\n.target sm_80\n.address_size 64\n.visible .entry k(.param .u64 out, .param .align 1 .b8 big[{bytes}]) \
                 {{ .reg .b64 %rd<2>; .reg .b16 %h<2>; ld.param.u64 %rd0, [out]; ld.param.u8 %h0, [big+{}]; st.global.u8 [%rd0], %h0; ret; }}",
                bytes - 1
            )
        };
        // 32764 bytes with the pointer, as the PTX manual says for version 8.1 and newer.
        let most = 32_764 - 8;
        assert!(context.load_module(text(most + 1).into()).is_err());
        let module = context.load_module(text(most).into()).unwrap();
        let f = module.load_function("k").unwrap();
        let out = stream.alloc_zeros::<u8>(1).unwrap();
        let address = {
            use cudarc::driver::DevicePtr;
            out.device_ptr(&stream).0
        };
        // Both values lie at odd addresses of the host.
        let mut host = [&[0][..], &address.to_le_bytes(), &vec![3; most as usize - 1], &[42]].concat();
        let start = host.as_mut_ptr();
        // SAFETY: the pointers are in `host`, with the parameters' bytes behind each.
        unsafe {
            let mut values: [*mut c_void; 2] = [start.add(1).cast(), start.add(9).cast()];
            let (none, values) = (std::ptr::null_mut(), values.as_mut_ptr());
            let result = sys::cuLaunchKernel(f.cu_function(), 1, 1, 1, 1, 1, 1, 0, none, values, none.cast());
            assert_eq!(result, OK);
            // A parameter that is not given.
            let mut values: [*mut c_void; 2] = [start.add(1).cast(), std::ptr::null_mut()];
            let result =
                sys::cuLaunchKernel(f.cu_function(), 1, 1, 1, 1, 1, 1, 0, none, values.as_mut_ptr(), none.cast());
            assert_eq!(result, INVALID);
        }
        assert_eq!(stream.clone_dtoh(&out).unwrap(), [42]);
        return;
    }
    let out = child(test, &[], true);
    let stderr = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{}\n{stderr}", String::from_utf8_lossy(&out.stdout));
    assert!(stderr.contains("parameter 1 (big) of kernel k is a null pointer"), "{stderr}");
}
