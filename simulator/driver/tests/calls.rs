//! Calls that cudarc has no safe form of, through its `sys`: extended launches, look-up by name, graphs, and what is not
//! simulated.

mod common;

use common::kernels::{bytes, floats, random};
use common::raw::{Buffer, INVALID_HANDLE, INVALID_VALUE, NOT_SUPPORTED, OK, setup};
use common::{child, compile, is_child, own_process};
use cudarc::driver::sys::{self, CUlaunchAttributeID as Id, CUresult};
use cudarc::driver::{CudaContext, CudaFunction};
use std::ffi::{CString, c_char, c_int, c_void};
use std::mem::MaybeUninit;
use std::sync::Arc;

const POINTWISE: &str = include_str!("../../tests/kernels/pointwise.cu");

fn kernel(context: &Arc<CudaContext>, name: &str) -> CudaFunction {
    context.load_module(compile(POINTWISE, "compute_80", &[]).into()).unwrap().load_function(name).unwrap()
}

/// A launch attribute whose value is a few words.
fn attribute(id: Id, words: &[u32]) -> sys::CUlaunchAttribute {
    let mut pad = [0; 64];
    for (room, byte) in pad.iter_mut().zip(words.iter().flat_map(|w| w.to_ne_bytes())) {
        *room = byte as i8;
    }
    sys::CUlaunchAttribute { id, pad: [0; 4], value: sys::CUlaunchAttributeValue { pad } }
}

/// Arguments of scale_add, y = x * 3 + 1 over 100 numbers; valid as long as the buffers.
fn arguments(y: &Buffer, x: &Buffer) -> [*mut c_void; 5] {
    static NUMBERS: (f32, f32, i32) = (3.0, 1.0, 100);
    [
        (&raw const y.0).cast_mut().cast(),
        (&raw const x.0).cast_mut().cast(),
        (&raw const NUMBERS.0).cast_mut().cast(),
        (&raw const NUMBERS.1).cast_mut().cast(),
        (&raw const NUMBERS.2).cast_mut().cast(),
    ]
}

/// scale_add through cuLaunchKernelEx: y = x * 3 + 1 over 100 numbers in blocks of 32.
fn launch_ex(
    f: &CudaFunction,
    y: &Buffer,
    x: &Buffer,
    grid: u32,
    attributes: &mut [sys::CUlaunchAttribute],
) -> CUresult {
    let mut values = arguments(y, x);
    let config = sys::CUlaunchConfig {
        gridDimX: grid,
        gridDimY: 1,
        gridDimZ: 1,
        blockDimX: 32,
        blockDimY: 1,
        blockDimZ: 1,
        sharedMemBytes: 0,
        hStream: std::ptr::null_mut(),
        attrs: attributes.as_mut_ptr(),
        numAttrs: attributes.len() as u32,
    };
    // SAFETY: the values are those of the kernel's header, in order, and outlive the call as the attributes do.
    unsafe { sys::cuLaunchKernelEx(&config, f.cu_function(), values.as_mut_ptr(), std::ptr::null_mut()) }
}

#[test]
fn extended_launches_run_and_heed_their_attributes() {
    let test = "extended_launches_run_and_heed_their_attributes";
    if is_child() {
        let (context, _stream) = setup();
        let f = kernel(&context, "scale_add");
        let host = random(100, 1);
        let want: Vec<f32> = host.iter().map(|v| v.mul_add(3.0, 1.0)).collect();
        let (x, y) = (Buffer::of(&bytes(&host)), Buffer::new(400));
        let good: [&[sys::CUlaunchAttribute]; 6] = [
            &[],
            &[attribute(Id::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION, &[1, 1, 1])],
            &[attribute(Id::CU_LAUNCH_ATTRIBUTE_COOPERATIVE, &[1])],
            &[attribute(Id::CU_LAUNCH_ATTRIBUTE_COOPERATIVE, &[0])],
            // Hints change nothing.
            &[attribute(Id::CU_LAUNCH_ATTRIBUTE_PRIORITY, &[1]), attribute(Id::CU_LAUNCH_ATTRIBUTE_IGNORE, &[7])],
            &[attribute(Id::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION, &[1])],
        ];
        for attributes in good {
            y.write(&bytes(&[f32::NAN; 100]));
            assert_eq!(launch_ex(&f, &y, &x, 4, &mut attributes.to_vec()), OK);
            let got = floats(&y.read());
            assert!(got.iter().zip(&want).all(|(g, w)| (g - w).abs() <= 1e-6), "{got:?}");
        }
        y.write(&bytes(&[7.0; 100]));
        let cluster = |words: &[u32]| attribute(Id::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION, words);
        let refused = |grid, a: sys::CUlaunchAttribute| launch_ex(&f, &y, &x, grid, &mut [a]);
        // A GPU runs clusters of up to eight blocks, which is not simulated; no GPU need run more.
        assert_eq!(refused(4, cluster(&[2, 1, 1])), NOT_SUPPORTED);
        assert_eq!(refused(8, cluster(&[2, 2, 2])), NOT_SUPPORTED);
        assert_eq!(refused(16, cluster(&[16, 1, 1])), CUresult::CUDA_ERROR_INVALID_CLUSTER_SIZE);
        assert_eq!(refused(4, cluster(&[1, 0, 1])), CUresult::CUDA_ERROR_INVALID_CLUSTER_SIZE);
        // A block of one warp: 32 of them fit on each of the H100's 132 multiprocessors.
        let all = || attribute(Id::CU_LAUNCH_ATTRIBUTE_COOPERATIVE, &[1]);
        assert_eq!(refused(132 * 32 + 1, all()), CUresult::CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE);
        assert_eq!(refused(4, attribute(Id::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_EVENT, &[])), NOT_SUPPORTED);
        assert_eq!(refused(0, all()), INVALID_VALUE);
        assert_eq!(floats(&y.read()), [7.0; 100], "a refused launch ran");
        // A launch that cannot be is refused also while its stream is captured, and is no node of the graph.
        let captured = context.new_stream().unwrap();
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        captured.begin_capture(mode).unwrap();
        let (mut graph, mut nodes) = (std::ptr::null_mut(), 99);
        // SAFETY: a launch of no blocks reads no parameters; the results outlive the calls.
        unsafe {
            let (s, none) = (captured.cu_stream(), std::ptr::null_mut::<c_void>());
            let empty = sys::cuLaunchKernel(f.cu_function(), 0, 1, 1, 32, 1, 1, 0, s, none.cast(), none.cast());
            assert_eq!(empty, INVALID_VALUE);
            assert_eq!(sys::cuStreamEndCapture(s, &mut graph), OK);
            assert_eq!(sys::cuGraphGetNodes(graph, none.cast(), &mut nodes), OK);
            assert_eq!(nodes, 0);
            assert_eq!(sys::cuGraphDestroy(graph), OK);
        }
        // Nothing of this ended the context.
        assert_eq!(launch_ex(&f, &y, &x, 132 * 32, &mut [all()]), OK);
        // SAFETY: refused before anything else is read.
        let result = unsafe {
            sys::cuLaunchKernelEx(std::ptr::null(), f.cu_function(), std::ptr::null_mut(), std::ptr::null_mut())
        };
        assert_eq!(result, INVALID_VALUE);
        return;
    }
    let out = child(test, &[("CUDA_SIM_ARCH", "sm_90")], true);
    let stderr = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{}\n{stderr}", String::from_utf8_lossy(&out.stdout));
    assert!(stderr.contains("launch attribute 7 "), "{stderr}");
}

#[test]
fn parameters_in_one_buffer_must_have_the_right_size() {
    let test = "parameters_in_one_buffer_must_have_the_right_size";
    if is_child() {
        let (context, _stream) = setup();
        let f = kernel(&context, "scale_add");
        let (x, y) = (Buffer::of(&bytes(&[2.0; 8])), Buffer::of(&bytes(&[0.0; 8])));
        // One byte off, so that the buffer is aligned to nothing.
        let params = [&[0][..], &y.0.to_le_bytes(), &x.0.to_le_bytes(), &bytes(&[3.0, 1.0]), &8i32.to_le_bytes(), &[0]];
        let params = params.concat();
        let launch = |mut size: usize, values: *mut *mut c_void| {
            let mut extra: [*mut c_void; 5] = [
                std::ptr::without_provenance_mut(1),
                params[1..].as_ptr().cast_mut().cast(),
                std::ptr::without_provenance_mut(2),
                (&raw mut size).cast(),
                std::ptr::null_mut(),
            ];
            // SAFETY: keys and pointers are as the manual says; the buffer has at least `size` bytes.
            unsafe {
                let stream = std::ptr::null_mut();
                sys::cuLaunchKernel(f.cu_function(), 1, 1, 1, 8, 1, 1, 0, stream, values, extra.as_mut_ptr())
            }
        };
        let none = std::ptr::null_mut();
        for size in [20, 27, 29] {
            assert_eq!(launch(size, none), CUresult::CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES, "{size}");
        }
        let mut both = [std::ptr::null_mut(); 5];
        assert_eq!(launch(28, both.as_mut_ptr()), INVALID_VALUE);
        assert_eq!(floats(&y.read()), [0.0; 8]);
        assert_eq!(launch(28, none), OK);
        assert_eq!(floats(&y.read()), [7.0; 8]);
        return;
    }
    let out = child(test, &[], true);
    let stderr = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{}\n{stderr}", String::from_utf8_lossy(&out.stdout));
    assert!(stderr.contains("scale_add takes 28 bytes of parameters, got 29"), "{stderr}");
}

/// cuGetProcAddress_v2: its result, the address, the status.
fn look_up(name: &str, version: c_int) -> (CUresult, *mut c_void, u32) {
    let name = CString::new(name).unwrap();
    let mut address = std::ptr::without_provenance_mut(99);
    let mut status = MaybeUninit::<sys::CUdriverProcAddressQueryResult>::uninit();
    // SAFETY: the name ends with a NUL, both results outlive the call, and no status but the driver's is assumed.
    unsafe {
        status.as_mut_ptr().cast::<u32>().write(99);
        let result = sys::cuGetProcAddress_v2(name.as_ptr(), &mut address, version, 0, status.as_mut_ptr());
        (result, address, status.as_ptr().cast::<u32>().read())
    }
}

#[test]
fn calls_are_found_by_name_and_version() {
    let test = "calls_are_found_by_name_and_version";
    if is_child() {
        let (_context, _stream) = setup();
        // SAFETY: the library is loaded already; its symbols are only compared.
        let library = unsafe { libloading::Library::new("libcuda.so") }.unwrap();
        let exported = |name: &str| {
            // SAFETY: as above.
            unsafe { library.get::<*mut c_void>(name.as_bytes()).unwrap().try_as_raw_ptr().unwrap() }
        };
        for (name, version, want) in [
            ("cuInit", 11_030, "cuInit"),
            ("cuMemAlloc", 13_000, "cuMemAlloc_v2"),
            ("cuMemsetD2D16", 12_000, "cuMemsetD2D16_v2"),
            ("cuLaunchKernelEx", 13_000, "cuLaunchKernelEx"),
            ("cuStreamGetCaptureInfo", 12_000, "cuStreamGetCaptureInfo_v2"),
            ("cuStreamGetCaptureInfo", 13_000, "cuStreamGetCaptureInfo_v3"),
            ("cuCtxCreate", 12_000, "cuCtxCreate_v2"),
            ("cuCtxCreate", 13_000, "cuCtxCreate_v4"),
        ] {
            assert_eq!(look_up(name, version), (OK, exported(want), 0), "{name} of {version}");
        }
        // What was found can be called.
        let (_, address, _) = look_up("cuDriverGetVersion", 13_000);
        // SAFETY: this is the call's type.
        let call: extern "C" fn(*mut c_int) -> CUresult = unsafe { std::mem::transmute(address) };
        let mut version = 0;
        assert_eq!((call(&mut version), version), (OK, 13_000));
        // The manual: an unknown name is a null pointer and status 1, not an error; CUDA 11 had no status.
        for name in ["cuNoSuchCall", "malloc", ""] {
            assert_eq!(look_up(name, 13_000), (OK, std::ptr::null_mut(), 1), "{name}");
        }
        // SAFETY: the library is loaded already; the type is that of CUDA 11.
        let old = unsafe {
            type Old = extern "C" fn(*const c_char, *mut *mut c_void, c_int, u64) -> CUresult;
            library.get::<Old>(b"cuGetProcAddress").unwrap()
        };
        let mut address = std::ptr::without_provenance_mut(99);
        assert_eq!(old(c"cuNoSuchCall".as_ptr(), &mut address, 12_000, 0), CUresult::CUDA_ERROR_NOT_FOUND);
        assert!(address.is_null());
        assert_eq!(old(c"cuInit".as_ptr(), &mut address, 12_000, 0), OK);
        assert_eq!(address, exported("cuInit"));
        assert_eq!(old(std::ptr::null(), &mut address, 12_000, 0), INVALID_VALUE);
        // A version newer than the driver's.
        assert_eq!(look_up("cuInit", 14_000).0, INVALID_VALUE);
        return;
    }
    let out = child(test, &[], true);
    let stderr = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{}\n{stderr}", String::from_utf8_lossy(&out.stdout));
    assert!(stderr.contains("`cuNoSuchCall`"), "{stderr}");
}

extern "C" fn count(data: *mut c_void) {
    // SAFETY: the test passes a live counter, and the work runs before its call returns.
    unsafe { *data.cast::<u32>() += 1 };
}

#[test]
fn graphs_hold_every_kind_of_work_and_can_be_launched_copied_and_destroyed() {
    let test = "graphs_hold_every_kind_of_work_and_can_be_launched_copied_and_destroyed";
    own_process(test, &[], || {
        let (context, _stream) = setup();
        let stream = context.new_stream().unwrap();
        let s = stream.cu_stream();
        let f = kernel(&context, "scale_add");
        let (x, y) = (Buffer::of(&bytes(&random(100, 2))), Buffer::of(&[0; 400]));
        let mut calls = 0u32;
        let mut result = vec![0f32; 100];
        let source = random(100, 3);
        // SAFETY: buffers and host memory outlive every launch of the graph; handles are used as their calls say.
        unsafe {
            let (mut graph, mut copy, mut exec) = (std::ptr::null_mut(), std::ptr::null_mut(), std::ptr::null_mut());
            let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
            assert_eq!(sys::cuStreamBeginCapture_v2(s, mode), OK);
            let mut status = sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
            assert_eq!(sys::cuStreamIsCapturing(s, &mut status), OK);
            assert_eq!(status, sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_ACTIVE);
            assert_eq!(sys::cuMemcpyHtoDAsync_v2(x.0, source.as_ptr().cast(), 400, s), OK);
            let mut values = arguments(&y, &x);
            let none = std::ptr::null_mut();
            assert_eq!(sys::cuLaunchKernel(f.cu_function(), 4, 1, 1, 32, 1, 1, 0, s, values.as_mut_ptr(), none), OK);
            assert_eq!(sys::cuMemsetD32Async(y.0 + 40, 2.5f32.to_bits(), 2, s), OK);
            assert_eq!(sys::cuMemcpyDtoDAsync_v2(y.0, y.0 + 40, 4, s), OK);
            assert_eq!(sys::cuLaunchHostFunc(s, Some(count), (&raw mut calls).cast()), OK);
            assert_eq!(sys::cuMemcpyDtoHAsync_v2(result.as_mut_ptr().cast(), y.0, 400, s), OK);
            assert_eq!(sys::cuStreamEndCapture(s, &mut graph), OK);
            let mut nodes = 0;
            assert_eq!(sys::cuGraphGetNodes(graph, std::ptr::null_mut(), &mut nodes), OK);
            assert_eq!((nodes, calls, &y.read()), (6, 0, &vec![0; 400]), "capturing did work");

            assert_eq!(sys::cuGraphClone(&mut copy, graph), OK);
            assert_eq!(sys::cuGraphDestroy(graph), OK);
            assert_eq!(sys::cuGraphDestroy(graph), INVALID_HANDLE);
            assert_eq!(sys::cuGraphInstantiateWithFlags(&mut exec, graph, 0), INVALID_HANDLE);
            assert_eq!(sys::cuGraphInstantiateWithFlags(&mut exec, copy, 1 << 20), INVALID_VALUE);
            assert_eq!(sys::cuGraphInstantiateWithFlags(&mut exec, copy, 0), OK);
            assert_eq!(sys::cuGraphDestroy(copy), OK);
            assert_eq!(sys::cuGraphUpload(exec, s), OK);
            assert_eq!(calls, 0);
            for launch in 1..=2 {
                result.fill(f32::NAN);
                assert_eq!(sys::cuGraphLaunch(exec, s), OK);
                stream.synchronize().unwrap();
                let mut want: Vec<f32> = source.iter().map(|v| v.mul_add(3.0, 1.0)).collect();
                (want[0], want[10], want[11]) = (2.5, 2.5, 2.5);
                assert!(result.iter().zip(&want).all(|(g, w)| (g - w).abs() <= 1e-6), "{result:?}");
                assert_eq!(calls, launch);
            }
            // Updating an instantiated graph is not simulated, and says so; the graph is as it was.
            let mut info: sys::CUgraphExecUpdateResultInfo = std::mem::zeroed();
            assert_eq!(sys::cuGraphExecUpdate_v2(exec, copy, &mut info), NOT_SUPPORTED);
            assert_eq!(sys::cuGraphLaunch(exec, s), OK);
            assert_eq!(calls, 3);
            assert_eq!(sys::cuGraphExecDestroy(exec), OK);
            assert_eq!(sys::cuGraphLaunch(exec, s), INVALID_HANDLE);
            assert_eq!(sys::cuGraphExecDestroy(exec), INVALID_HANDLE);
            assert_eq!(calls, 3);
        }
    });
}

/// Names in the list of calls that are not simulated.
fn unsupported() -> Vec<&'static str> {
    let source = include_str!("../src/unsupported.rs");
    let (_, list) = source.split_once("unsupported! {").unwrap();
    list.split([',', '}']).map(str::trim).filter(|n| n.starts_with("cu")).collect()
}

#[test]
fn every_call_that_is_not_simulated_is_an_error_that_names_it() {
    let test = "every_call_that_is_not_simulated_is_an_error_that_names_it";
    if is_child() {
        let (_context, _stream) = setup();
        // SAFETY: the library is loaded already.
        let library = unsafe { libloading::Library::new("libcuda.so") }.unwrap();
        for name in unsupported() {
            // SAFETY: these calls take any arguments, for they look at none.
            let call = unsafe { library.get::<extern "C" fn() -> CUresult>(name.as_bytes()) }.unwrap();
            assert_eq!(call(), NOT_SUPPORTED, "{name}");
        }
        return;
    }
    let names = unsupported();
    assert!(names.len() > 300 && names.contains(&"cuGraphExecKernelNodeSetParams_v2"), "{}", names.len());
    let out = child(test, &[], true);
    let stderr = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{}\n{stderr}", String::from_utf8_lossy(&out.stdout));
    for name in names {
        assert!(stderr.contains(&format!("{name}: this driver call is not simulated")), "{name} is not named");
    }
}

#[test]
fn unknown_attributes_are_errors_that_name_them() {
    let test = "unknown_attributes_are_errors_that_name_them";
    const UNKNOWN: u32 = 987;
    if is_child() {
        let (context, _stream) = setup();
        let f = kernel(&context, "scale_add");
        // SAFETY: the library is loaded already; the types are the calls' own, but for numbers in place of enums, which
        // have no value for what does not exist.
        unsafe {
            let library = libloading::Library::new("libcuda.so").unwrap();
            let of_device = library.get::<extern "C" fn(*mut c_int, u32, c_int) -> CUresult>(b"cuDeviceGetAttribute");
            let of_function =
                library.get::<extern "C" fn(*mut c_int, u32, sys::CUfunction) -> CUresult>(b"cuFuncGetAttribute");
            let set_function =
                library.get::<extern "C" fn(sys::CUfunction, u32, c_int) -> CUresult>(b"cuFuncSetAttribute");
            let of_pool =
                library.get::<extern "C" fn(sys::CUmemoryPool, u32, *mut u64) -> CUresult>(b"cuMemPoolGetAttribute");
            let of_pointer = library.get::<extern "C" fn(*mut u64, u32, u64) -> CUresult>(b"cuPointerGetAttribute");
            let limit = library.get::<extern "C" fn(*mut usize, u32) -> CUresult>(b"cuCtxGetLimit");
            let (mut int, mut word, mut size) = (77, 77, 77);
            let function = f.cu_function();
            assert_eq!(of_device.unwrap()(&mut int, UNKNOWN, 0), INVALID_VALUE);
            assert_eq!(of_function.unwrap()(&mut int, UNKNOWN, function), INVALID_VALUE);
            assert_eq!(set_function.unwrap()(function, UNKNOWN, 1), INVALID_VALUE);
            let mut pool = std::ptr::null_mut();
            assert_eq!(sys::cuDeviceGetDefaultMemPool(&mut pool, 0), OK);
            assert_eq!(of_pool.unwrap()(pool, UNKNOWN, &mut word), INVALID_VALUE);
            let buffer = Buffer::new(4);
            assert_eq!(of_pointer.unwrap()(&mut word, UNKNOWN, buffer.0), INVALID_VALUE);
            assert_eq!(limit.unwrap()(&mut size, UNKNOWN), CUresult::CUDA_ERROR_UNSUPPORTED_LIMIT);
            assert_eq!((int, word, size), (77, 77, 77), "an unknown attribute has a value");
        }
        return;
    }
    let out = child(test, &[], true);
    let stderr = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{}\n{stderr}", String::from_utf8_lossy(&out.stdout));
    for call in [
        "cuDeviceGetAttribute: device attribute 987",
        "cuFuncGetAttribute: function attribute 987",
        "cuFuncSetAttribute: function attribute 987",
        "cuMemPoolGetAttribute: pool attribute 987",
        "cuPointerGetAttribute: attribute 987",
        "cuCtxGetLimit: limit 987",
    ] {
        assert!(stderr.contains(call), "no `{call}` in {stderr}");
    }
}
