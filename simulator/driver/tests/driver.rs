//! The driver's own behaviour through cudarc: device, memory, streams, events, graphs, modules, refusals.

mod common;

use common::kernels::random;
use common::{child, compile, driver_folder, is_child, nvrtc_folder, own_process};
use cudarc::driver::sys::{self, CUdevice_attribute as Attribute, CUfunction_attribute as FunctionAttribute, CUresult};
use cudarc::driver::{CudaContext, CudaFunction, CudaSlice, CudaStream, LaunchConfig, PushKernelArg};
use cudarc::nvrtc::Ptx;
use std::sync::Arc;

const POINTWISE: &str = include_str!("../../tests/kernels/pointwise.cu");

fn load(context: &Arc<CudaContext>, kernel: &str) -> CudaFunction {
    let module = context.load_module(compile(POINTWISE, "compute_80", &[]).into()).unwrap();
    module.load_function(kernel).unwrap()
}

/// y = x * scale + add
fn scale_add(
    stream: &Arc<CudaStream>,
    f: &CudaFunction,
    y: &mut CudaSlice<f32>,
    x: &CudaSlice<f32>,
    scale: f32,
    add: f32,
) {
    let n = x.len() as i32;
    let mut launch = stream.launch_builder(f);
    launch.arg(y).arg(x).arg(&scale).arg(&add).arg(&n);
    // SAFETY: the arguments are those of the kernel's header, in order.
    unsafe { launch.launch(LaunchConfig::for_num_elems(n as u32)) }.unwrap();
}

fn code<T: std::fmt::Debug>(result: Result<T, cudarc::driver::DriverError>) -> CUresult {
    result.unwrap_err().0
}

#[test]
fn the_device_is_a_simulator_of_the_chosen_architecture() {
    let test = "the_device_is_a_simulator_of_the_chosen_architecture";
    let known = [
        ("sm_80", (8, 0), 108, 163 * 1024, 167_936),
        ("sm_86", (8, 6), 82, 99 * 1024, 102_400),
        ("sm_89", (8, 9), 128, 99 * 1024, 102_400),
        ("sm_90", (9, 0), 132, 227 * 1024, 233_472),
        ("sm_120", (12, 0), 170, 99 * 1024, 102_400),
    ];
    if is_child() {
        let arch = std::env::var("CUDA_SIM_ARCH").unwrap_or("sm_80".into());
        let (_, capability, count, block, all) = known.into_iter().find(|k| k.0 == arch).unwrap();
        let context = CudaContext::new(0).unwrap();
        let name = context.name().unwrap();
        assert!(name.contains("simulator") && name.contains(&arch), "{name}");
        assert_eq!(context.compute_capability().unwrap(), capability);
        let get = |a| context.attribute(a).unwrap();
        assert_eq!(get(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT), count);
        assert_eq!(get(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN), block);
        assert_eq!(get(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR), all);
        assert_eq!(get(Attribute::CU_DEVICE_ATTRIBUTE_WARP_SIZE), 32);
        assert_eq!(CudaContext::device_count().unwrap(), 1);
        assert_eq!(code(CudaContext::new(1)), CUresult::CUDA_ERROR_INVALID_DEVICE);
        let (free, total) = context.mem_get_info().unwrap();
        assert!(free <= total && total == context.total_mem().unwrap());
        // An attribute beyond all known ones.
        let mut value = 0;
        // SAFETY: `value` outlives the call.
        let result = unsafe { sys::cuDeviceGetAttribute(&mut value, Attribute::CU_DEVICE_ATTRIBUTE_MAX, 0) };
        assert_eq!(result, CUresult::CUDA_ERROR_INVALID_VALUE);
        return;
    }
    for arch in known {
        let out = child(test, &[("CUDA_SIM_ARCH", arch.0)], true);
        let stderr = String::from_utf8_lossy(&out.stderr);
        assert!(out.status.success(), "{stderr}");
        let unknown = format!("device attribute {}", Attribute::CU_DEVICE_ATTRIBUTE_MAX as u32);
        assert!(stderr.contains(&unknown), "{stderr}");
    }
    assert!(child(test, &[], true).status.success());
}

#[test]
fn bad_variables_stop_initialisation() {
    let test = "bad_variables_stop_initialisation";
    if is_child() {
        assert_eq!(code(CudaContext::new(0)), CUresult::CUDA_ERROR_INVALID_VALUE);
        return;
    }
    for (name, value) in [("CUDA_SIM_ARCH", "sm_70"), ("CUDA_SIM_SEDE", "1"), ("CUDA_SIM_BUDGET", "much")] {
        let out = child(test, &[(name, value)], true);
        let stderr = String::from_utf8_lossy(&out.stderr);
        assert!(out.status.success() && stderr.contains(name), "{stderr}");
    }
}

#[test]
fn a_library_loaded_by_path_answers_to_cudarc() {
    let test = "a_library_loaded_by_path_answers_to_cudarc";
    if is_child() {
        let nvrtc = nvrtc_folder();
        for file in
            [driver_folder().join("libcuda.so"), nvrtc.join("libnvrtc-builtins.so.13.0"), nvrtc.join("libnvrtc.so.13")]
        {
            // SAFETY: the libraries' initialisers have no conditions. They stay loaded, so that cudarc's search by
            // name finds them.
            std::mem::forget(unsafe { libloading::Library::new(file) }.unwrap());
        }
        let context = CudaContext::new(0).unwrap();
        load(&context, "scale_add");
        return;
    }
    let out = child(test, &[], false);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
}

#[test]
fn without_a_choice_no_simulator_is_found() {
    let test = "without_a_choice_no_simulator_is_found";
    if is_child() {
        // SAFETY: only looks for a library.
        if unsafe { sys::is_culib_present() } {
            // A machine with a GPU: its own driver was found, not ours.
            let name = CudaContext::new(0).map(|c| c.name().unwrap()).unwrap_or_default();
            assert!(!name.contains("simulator"), "{name}");
        }
        return;
    }
    // The path that cargo sets for programs and tests.
    let exe = std::env::current_exe().unwrap();
    let deps = exe.parent().unwrap();
    let path = std::env::join_paths([deps.parent().unwrap(), deps]).unwrap();
    let out = child(test, &[("LD_LIBRARY_PATH", path.to_str().unwrap())], false);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
}

#[test]
fn memory_is_copied_filled_and_counted() {
    own_process("memory_is_copied_filled_and_counted", &[], || {
        let context = CudaContext::new(0).unwrap();
        let stream = context.default_stream();
        let before = context.mem_get_info().unwrap().0;
        let host: Vec<u32> = (0..1000).collect();
        let a = stream.clone_htod(&host).unwrap();
        assert!(context.mem_get_info().unwrap().0 <= before - 4000);
        let mut b = stream.alloc_zeros::<u32>(1000).unwrap();
        assert_eq!(stream.clone_dtoh(&b).unwrap(), vec![0; 1000]);
        stream.memcpy_dtod(&a.slice(100..200), &mut b.slice_mut(0..100)).unwrap();
        assert_eq!(stream.clone_dtoh(&b).unwrap()[..101], [&host[100..200], &[0]].concat());
        stream.memset_zeros(&mut b).unwrap();
        assert_eq!(stream.clone_dtoh(&b).unwrap(), vec![0; 1000]);

        // Pinned host memory.
        // SAFETY: written before it is read.
        let mut pinned = unsafe { context.alloc_pinned::<u32>(1000) }.unwrap();
        pinned.as_mut_slice().unwrap().copy_from_slice(&host);
        stream.memcpy_htod(&pinned, &mut b).unwrap();
        assert_eq!(stream.clone_dtoh(&b).unwrap(), host);
        drop((a, b, pinned));
        assert_eq!(context.mem_get_info().unwrap().0, before);
    });
}

#[test]
fn wrong_host_calls_are_refused() {
    own_process("wrong_host_calls_are_refused", &[], || {
        let context = CudaContext::new(0).unwrap();
        context.bind_to_thread().unwrap();
        let stream = context.default_stream();
        let a = stream.clone_htod(&[1u8; 100]).unwrap();
        let address = {
            use cudarc::driver::DevicePtr;
            a.device_ptr(&stream).0
        };
        let mut out = [0u8; 128];
        // SAFETY: all host pointers are null or have room; what is wrong with the calls is the device side.
        unsafe {
            let to = out.as_mut_ptr().cast();
            assert_eq!(sys::cuMemcpyDtoH_v2(to, address, 101), CUresult::CUDA_ERROR_INVALID_VALUE);
            assert_eq!(sys::cuMemcpyDtoH_v2(to, 0, 1), CUresult::CUDA_ERROR_INVALID_VALUE);
            assert_eq!(sys::cuMemFree_v2(address + 1), CUresult::CUDA_ERROR_INVALID_VALUE);
            assert_eq!(sys::cuMemAlloc_v2(std::ptr::null_mut(), 4), CUresult::CUDA_ERROR_INVALID_VALUE);
            let mut p = 0;
            assert_eq!(sys::cuMemAlloc_v2(&mut p, 0), CUresult::CUDA_ERROR_INVALID_VALUE);
            assert_eq!(sys::cuMemAlloc_v2(&mut p, 1 << 60), CUresult::CUDA_ERROR_OUT_OF_MEMORY);
            let none = 0x123usize as sys::CUstream;
            assert_eq!(sys::cuStreamSynchronize(none), CUresult::CUDA_ERROR_INVALID_HANDLE);
            assert_eq!(sys::cuDeviceGetCount(std::ptr::null_mut()), CUresult::CUDA_ERROR_INVALID_VALUE);
            let mut context = std::ptr::null_mut();
            assert_eq!(sys::cuCtxGetCurrent(&mut context), CUresult::CUDA_SUCCESS);
            assert!(!context.is_null());
            // A call that is not simulated.
            assert_eq!(sys::cuArrayDestroy(std::ptr::null_mut()), CUresult::CUDA_ERROR_NOT_SUPPORTED);
        }
        std::thread::spawn(|| {
            let mut p = 0;
            // SAFETY: `p` outlives the call. This thread has no context.
            let result = unsafe { sys::cuMemAlloc_v2(&mut p, 4) };
            assert_eq!(result, CUresult::CUDA_ERROR_INVALID_CONTEXT);
        })
        .join()
        .unwrap();
    });
}

#[test]
fn parameters_of_every_size_arrive() {
    own_process("parameters_of_every_size_arrive", &[], || {
        let context = CudaContext::new(0).unwrap();
        let stream = context.default_stream();
        let f = load(&context, "parameters");
        let mut y = stream.alloc_zeros::<f64>(6).unwrap();
        let mut launch = stream.launch_builder(&f);
        launch.arg(&mut y).arg(&200u8).arg(&-3i16).arg(&-70_000i32).arg(&(1i64 << 40)).arg(&0.5f32).arg(&-0.25f64);
        let one = LaunchConfig { grid_dim: (1, 1, 1), block_dim: (1, 1, 1), shared_mem_bytes: 0 };
        // SAFETY: the arguments are the kernel's, in order.
        unsafe { launch.launch(one) }.unwrap();
        let want = [200.0, -3.0, -70_000.0, (1i64 << 40) as f64, 0.5, -0.25];
        assert_eq!(stream.clone_dtoh(&y).unwrap(), want);
    });
}

#[test]
fn launches_that_a_gpu_refuses_are_refused_and_leave_the_context_usable() {
    own_process(
        "launches_that_a_gpu_refuses_are_refused_and_leave_the_context_usable",
        &[("CUDA_SIM_REPORT", "/dev/null")],
        || {
            if std::env::var_os("CUDA_SIM_EXIT_CODE").is_some() {
                // Refusals are findings, so this process is judged by a child without that variable.
                let out = std::process::Command::new(std::env::current_exe().unwrap())
                    .args(std::env::args().skip(1))
                    .env_remove("CUDA_SIM_EXIT_CODE")
                    .output()
                    .unwrap();
                assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
                return;
            }
            let context = CudaContext::new(0).unwrap();
            let stream = context.default_stream();
            let module = context.load_module(compile(POINTWISE, "compute_80", &[]).into()).unwrap();
            let f = module.load_function("reverse").unwrap();
            let mut table = module.get_global("table", &stream).unwrap();
            stream.memcpy_htod(&bytemuck(&[2.0f32, 0.0, 0.0, 0.0]), &mut table).unwrap();
            let n = 1024u32;
            let host = random(n as usize, 3);
            let x = stream.clone_htod(&host).unwrap();
            let mut y = stream.alloc_zeros::<f32>(n as usize).unwrap();
            let mut run = |grid: u32, threads: u32, shared: u32| {
                let mut launch = stream.launch_builder(&f);
                launch.arg(&mut y).arg(&x);
                let c = LaunchConfig { grid_dim: (grid, 1, 1), block_dim: (threads, 1, 1), shared_mem_bytes: shared };
                // SAFETY: the arguments are the kernel's, in order; refused shapes do not run.
                unsafe { launch.launch(c) }.map(|_| ())
            };
            assert_eq!(code(run(1, 1025, 4096)), CUresult::CUDA_ERROR_INVALID_VALUE);
            assert_eq!(code(run(0, 32, 4096)), CUresult::CUDA_ERROR_INVALID_VALUE);
            assert_eq!(code(run(1, n, 100 * 1024)), CUresult::CUDA_ERROR_INVALID_VALUE);
            let set =
                |bytes| f.set_attribute(FunctionAttribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, bytes);
            assert_eq!(code(set(164 * 1024)), CUresult::CUDA_ERROR_INVALID_VALUE);
            set(100 * 1024).unwrap();
            run(1, n, 100 * 1024).unwrap();
            let want: Vec<f32> = host.iter().rev().map(|v| v * 2.0).collect();
            assert_eq!(stream.clone_dtoh(&y).unwrap(), want);

            assert_eq!(f.occupancy_max_active_blocks_per_multiprocessor(1024, 80 * 1024, None).unwrap(), 2);
            assert_eq!(f.occupancy_max_active_blocks_per_multiprocessor(1024, 100 * 1024, None).unwrap(), 1);
            assert_eq!(f.max_threads_per_block().unwrap(), 1024);
            assert_eq!(f.ptx_version().unwrap(), 90);
            assert_eq!(f.const_size_bytes().unwrap(), 16);
        },
    );
}

fn bytemuck(values: &[f32]) -> Vec<u8> {
    common::kernels::bytes(values)
}

#[test]
fn machine_code_and_bad_ptx_are_refused_by_different_codes() {
    own_process("machine_code_and_bad_ptx_are_refused_by_different_codes", &[], || {
        let context = CudaContext::new(0).unwrap();
        let cubin = context.load_module(Ptx::from_binary(b"\x7fELF\x02\x01\x01\0rest\0".to_vec()));
        assert_eq!(code(cubin), CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU);
        assert_eq!(code(context.load_module("no PTX at all".into())), CUresult::CUDA_ERROR_INVALID_PTX);
        let module = context.load_module(compile(POINTWISE, "compute_80", &[]).into()).unwrap();
        assert_eq!(code(module.load_function("nothing")), CUresult::CUDA_ERROR_NOT_FOUND);
    });
}

#[test]
fn streams_and_events_keep_their_order() {
    own_process("streams_and_events_keep_their_order", &[], || {
        let context = CudaContext::new(0).unwrap();
        let (a, b) = (context.new_stream().unwrap(), context.new_stream().unwrap());
        let f = load(&context, "scale_add");
        let x = a.clone_htod(&random(100, 4)).unwrap();
        let (mut y, mut z) = (a.alloc_zeros::<f32>(100).unwrap(), a.alloc_zeros::<f32>(100).unwrap());
        let timed = Some(sys::CUevent_flags::CU_EVENT_DEFAULT);
        let start = a.record_event(timed).unwrap();
        scale_add(&a, &f, &mut y, &x, 2.0, 1.0);
        let middle = a.record_event(timed).unwrap();
        b.wait(&middle).unwrap();
        scale_add(&b, &f, &mut z, &y, 3.0, 0.0);
        let end = b.record_event(timed).unwrap();
        end.synchronize().unwrap();
        assert!(end.is_complete());
        let want: Vec<f32> = random(100, 4).iter().map(|v| v.mul_add(2.0, 1.0) * 3.0).collect();
        let got = b.clone_dtoh(&z).unwrap();
        assert!(got.iter().zip(&want).all(|(g, w)| (g - w).abs() <= 1e-6), "{got:?}");
        let (first, both) = (start.elapsed_ms(&middle).unwrap(), start.elapsed_ms(&end).unwrap());
        assert!(first > 0.0 && both >= first, "{first} {both}");
        // Without timing, and never recorded.
        let untimed = a.record_event(None).unwrap();
        assert_eq!(code(start.elapsed_ms(&untimed)), CUresult::CUDA_ERROR_INVALID_HANDLE);
        let never = context.new_event(timed).unwrap();
        assert_eq!(code(start.elapsed_ms(&never)), CUresult::CUDA_ERROR_INVALID_HANDLE);
        a.wait(&never).unwrap();
    });
}

const MODE: sys::CUstreamCaptureMode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_GLOBAL;

#[test]
fn graphs_replay_what_was_captured() {
    own_process("graphs_replay_what_was_captured", &[], || {
        let context = CudaContext::new(0).unwrap();
        // SAFETY: one stream orders all accesses, and the fork below is joined by hand.
        unsafe { context.disable_event_tracking() };
        let (stream, other) = (context.new_stream().unwrap(), context.new_stream().unwrap());
        let f = load(&context, "scale_add");
        let mut x = stream.clone_htod(&[1.0f32; 8]).unwrap();
        let mut y = stream.alloc_zeros::<f32>(8).unwrap();
        let mut z = stream.alloc_zeros::<f32>(8).unwrap();
        stream.begin_capture(MODE).unwrap();
        scale_add(&stream, &f, &mut y, &x, 2.0, 1.0);
        // Fork and join.
        other.join(&stream).unwrap();
        scale_add(&other, &f, &mut z, &y, 10.0, 0.0);
        stream.join(&other).unwrap();
        // Memory of the graph's own.
        // SAFETY: overwritten by the copy.
        let mut own = unsafe { stream.alloc::<f32>(8) }.unwrap();
        stream.memcpy_dtod(&z, &mut own).unwrap();
        stream.memset_zeros(&mut z).unwrap();
        scale_add(&stream, &f, &mut z, &own, 1.0, 0.5);
        drop(own);
        let graph = stream.end_capture(sys::CUgraphInstantiate_flags(0)).unwrap().unwrap();
        // Nothing has run yet.
        assert_eq!(stream.clone_dtoh(&z).unwrap(), [0.0; 8]);
        for value in [1.0f32, 3.0] {
            stream.memcpy_htod(&[value; 8], &mut x).unwrap();
            graph.launch().unwrap();
            assert_eq!(stream.clone_dtoh(&y).unwrap(), [2.0 * value + 1.0; 8]);
            assert_eq!(stream.clone_dtoh(&z).unwrap(), [(2.0 * value + 1.0) * 10.0 + 0.5; 8]);
        }
    });
}

#[test]
fn captures_refuse_what_a_graph_cannot_hold() {
    own_process("captures_refuse_what_a_graph_cannot_hold", &[], || {
        let context = CudaContext::new(0).unwrap();
        // SAFETY: no memory is shared between streams here.
        unsafe { context.disable_event_tracking() };
        let (stream, other) = (context.new_stream().unwrap(), context.new_stream().unwrap());
        let flags = || sys::CUgraphInstantiate_flags(0);
        let mut x = stream.alloc_zeros::<f32>(8).unwrap();
        let end = |stream: &Arc<CudaStream>| match stream.end_capture(flags()) {
            Err(e) => e.0,
            Ok(_) => CUresult::CUDA_SUCCESS,
        };
        // A stream that is captured cannot be waited for by the host; the capture is lost.
        stream.begin_capture(MODE).unwrap();
        assert_eq!(code(stream.synchronize()), CUresult::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
        assert_eq!(code(stream.memset_zeros(&mut x)), CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
        assert_eq!(end(&stream), CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
        // Work that was forked and never joined.
        stream.begin_capture(MODE).unwrap();
        other.join(&stream).unwrap();
        other.memset_zeros(&mut x).unwrap();
        assert_eq!(end(&stream), CUresult::CUDA_ERROR_STREAM_CAPTURE_UNJOINED);
        // An event from before the capture.
        let event = other.record_event(None).unwrap();
        stream.begin_capture(MODE).unwrap();
        assert_eq!(code(stream.wait(&event)), CUresult::CUDA_ERROR_STREAM_CAPTURE_ISOLATION);
        assert_eq!(end(&stream), CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
        // The default stream, and streams that are not captured.
        assert_eq!(code(context.default_stream().begin_capture(MODE)), CUresult::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
        assert_eq!(end(&other), CUresult::CUDA_ERROR_ILLEGAL_STATE);
        // All is well again.
        stream.begin_capture(MODE).unwrap();
        stream.memset_zeros(&mut x).unwrap();
        assert_eq!(end(&stream), CUresult::CUDA_SUCCESS);
        stream.synchronize().unwrap();
    });
}

#[test]
fn tensor_maps_are_encoded_or_refused() {
    own_process("tensor_maps_are_encoded_or_refused", &[("CUDA_SIM_ARCH", "sm_90")], || {
        let _context = CudaContext::new(0).unwrap();
        #[repr(align(64))]
        struct Map(sys::CUtensorMap);
        let encode = |width: u32| {
            let mut map = Map(sys::CUtensorMap { opaque: [0; 16] });
            let (dims, strides) = ([256u64, 64], [512u64]);
            let (boxes, steps) = ([width, 8u32], [1u32, 1]);
            // SAFETY: the map is aligned to 64 bytes; the arrays hold rank and rank - 1 values.
            let result = unsafe {
                sys::cuTensorMapEncodeTiled(
                    &mut map.0,
                    sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                    2,
                    0x7_0000_0000usize as *mut _,
                    dims.as_ptr(),
                    strides.as_ptr(),
                    boxes.as_ptr(),
                    steps.as_ptr(),
                    sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                    sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                    sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_NONE,
                    sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
                )
            };
            (result, map.0.opaque)
        };
        let (result, map) = encode(64);
        assert_eq!(result, CUresult::CUDA_SUCCESS);
        assert_ne!(map, [0; 16]);
        // 256 bytes are wider than the swizzle's 128.
        assert_eq!(encode(128).0, CUresult::CUDA_ERROR_INVALID_VALUE);
    });
}

#[test]
fn counters_are_written_for_every_launch() {
    let test = "counters_are_written_for_every_launch";
    if is_child() {
        let context = CudaContext::new(0).unwrap();
        let stream = context.default_stream();
        let f = load(&context, "scale_add");
        let x = stream.clone_htod(&[1.0f32; 256]).unwrap();
        let mut y = stream.alloc_zeros::<f32>(256).unwrap();
        scale_add(&stream, &f, &mut y, &x, 2.0, 1.0);
        scale_add(&stream, &f, &mut y, &x, 2.0, 1.0);
        return;
    }
    let folder = std::env::temp_dir();
    let file = folder.join(format!("cuda-sim-counters-{}.jsonl", std::process::id()));
    let log = folder.join(format!("cuda-sim-ptxas-{}.log", std::process::id()));
    let _ = std::fs::remove_file(&file);
    let text = "Compiling entry function 'scale_add' for 'sm_80'\nUsed 12 registers, used 0 barriers\n";
    std::fs::write(&log, text).unwrap();
    let variables = [("CUDA_SIM_COUNTERS", file.to_str().unwrap()), ("CUDA_SIM_PTXAS_LOG", log.to_str().unwrap())];
    let out = child(test, &variables, true);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let text = std::fs::read_to_string(&file).unwrap();
    let lines: Vec<serde_json::Value> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    std::fs::remove_file(&file).unwrap();
    std::fs::remove_file(&log).unwrap();
    assert_eq!(lines.len(), 2);
    assert_eq!(lines[0]["kernel"], "scale_add");
    assert_eq!((&lines[0]["registers"], &lines[0]["registers_from_assembler"]), (&12.into(), &true.into()));
    assert_eq!(lines[0]["counters"]["dram_bytes_read"], 1024);
    assert_eq!(lines[0]["counters"]["dram_bytes_written"], 1024);
}
