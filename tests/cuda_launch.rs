//! Launches: checked arguments, both precisions, graphs, the fallback from machine code to PTX.

mod common;

use common::cuda::{Output, device};
use common::numbers;
use common::rounded;
use dtr_fused::autograd::cuda::{DeviceWeights, pass};
use dtr_fused::autograd::{Memory, Weights, infer};
use dtr_fused::backend::cuda::device::Recorded;
use dtr_fused::backend::cuda::launch::Matrix;
use dtr_fused::backend::cuda::{Arg, Buffer, DType, Device, Launch};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

fn add(device: &Device, to: &Output, from: &Output, elem: DType) -> dtr_fused::Result<()> {
    let n = to.buffer().len();
    let grid = [n.div_ceil(256) as u32, 1, 1];
    let launch = Launch { file: "tensor", kernel: "tensor_add", elem, defines: &[], grid, block: 256, shared: 0 };
    // SAFETY: both have n numbers.
    unsafe { device.launch(&launch, &[to.buffer().into(), from.buffer().into(), Arg::U64(n as u64)]) }
}

#[test]
fn a_kernel_runs_and_a_graph_replays_it() {
    let device = device();
    for elem in [DType::F32, DType::Bf16] {
        let (a, b) = (rounded(&numbers(1, 1000), elem), rounded(&numbers(2, 1000), elem));
        let (to, from) = (Output::with(&device, &a, elem), Output::with(&device, &b, elem));
        add(&device, &to, &from, elem).unwrap();
        let once: Vec<f32> = a.iter().zip(&b).map(|(a, b)| a + b).collect();
        let once = rounded(&once, elem);
        assert_eq!(to.numbers(&device), once);
        let graph = device.capture(|device| add(device, &to, &from, elem)).unwrap();
        assert_eq!(to.numbers(&device), once, "capturing must not run");
        // SAFETY: both are where they were.
        unsafe { device.replay(&graph) }.unwrap();
        let twice: Vec<f32> = once.iter().zip(&b).map(|(a, b)| a + b).collect();
        assert_eq!(to.numbers(&device), rounded(&twice, elem));
    }
}

/// Such a thread has no context of its own.
#[test]
fn memory_may_be_given_back_on_any_thread() {
    let device = device();
    let allocation = device.upload(&[1.0; 8], DType::F32).unwrap();
    std::thread::spawn(move || drop(allocation)).join().unwrap();
    device.synchronize().unwrap();
}

#[test]
fn gradients_are_not_written_over_the_weights() {
    let device = Arc::new(device());
    let weights = DeviceWeights::upload(&device, &[1.0; 8], DType::F32).unwrap();
    let mut memory = Memory::on_device(&device, DType::F32);
    let error = pass(&weights, Some((weights.full(), false)), &mut memory, |_| Ok(())).unwrap_err().to_string();
    assert!(error.starts_with("gradients cannot be written over the weights"), "{error}");
}

#[test]
fn many_numbers_are_rounded_piece_by_piece() {
    let device = device();
    // More than a piece, the last one short.
    let n = (1 << 24) + 5;
    let numbers: Vec<f32> = (0..n).map(|i| (i % 16_381) as f32 * 1.001 - 7.0).collect();
    let allocation = device.upload(&numbers, DType::Bf16).unwrap();
    assert!(device.download(&allocation).unwrap() == rounded(&numbers, DType::Bf16), "rounded numbers are others");
    for wrong in [&numbers[1..], &[&numbers[..], &[0.0]].concat()] {
        let says = device.write(&allocation, wrong).unwrap_err().to_string();
        assert!(says.contains(&format!("{} numbers for a buffer of {n}", wrong.len())), "{says}");
    }
}

#[test]
fn what_does_not_compile_is_told_when_it_is_prepared() {
    let device = device();
    let recorded = |file| Recorded {
        file,
        kernel: "tensor_add",
        elem: DType::F32,
        defines: Vec::new(),
        grid: [1; 3],
        block: 256,
        shared: 0,
    };
    device.prepare(&[recorded("tensor"), recorded("tensor")]).unwrap();
    let says = device.prepare(&[recorded("tensor"), recorded("tenser")]).unwrap_err().to_string();
    assert!(says.contains("there is no kernel file tenser.cu"), "{says}");
}

#[test]
fn launches_are_timed_and_graphs_then_refused() {
    let device = device();
    let (to, from) = [1, 2].map(|seed| Output::with(&device, &numbers(seed, 1000), DType::F32)).into();
    let add_on = |device: &Arc<Device>| add(device, &to, &from, DType::F32);
    let add = || add(&device, &to, &from, DType::F32);
    let kernels = device
        .time_launches(|| {
            let says = device.capture(add_on).err().unwrap().to_string();
            assert!(says.contains("while launches are timed"), "{says}");
            add().and_then(|()| add())
        })
        .unwrap();
    let [only] = &kernels[..] else { panic!("one kernel was launched, not {kernels:?}") };
    assert_eq!((only.file, only.kernel, only.launches), ("tensor", "tensor_add", 2));
    assert!(only.seconds > 0.0);

    // Neither a failure nor what was launched before or after is left behind.
    let error = device.time_launches(|| add().and(Err(dtr_fused::Error::usage("stop")))).unwrap_err();
    assert!(error.to_string().contains("stop"));
    add().unwrap();
    assert!(device.time_launches(|| Ok(())).unwrap().is_empty());
    device.capture(add_on).unwrap();
}

/// Calls what is expected to panic.
fn panics<R>(work: impl FnOnce() -> R) {
    assert!(catch_unwind(AssertUnwindSafe(work)).is_err(), "nothing panicked");
}

#[test]
fn a_device_works_again_after_a_panic() {
    let device = Arc::new(device());
    let (a, b) = (numbers(1, 1000), numbers(2, 1000));
    let (to, from) = [&a, &b].map(|x| Output::with(&device, x, DType::F32)).into();
    let add_on = |device: &Arc<Device>| add(device, &to, &from, DType::F32);
    let mut expected = a.clone();
    let mut check_add = || {
        add_on(&device).unwrap();
        expected.iter_mut().zip(&b).for_each(|(x, y)| *x += y);
        assert_eq!(to.numbers(&device), expected);
    };
    check_add();

    // In the dry run of a pass, and in the other.
    let weights = DeviceWeights::upload(&device, &a, DType::F32).unwrap();
    let mut memory = Memory::on_device(&device, DType::F32);
    let mut read = |panics_in: usize| {
        let mut run = 0;
        pass(&weights, None, &mut memory, |tape| {
            run += 1;
            let x = tape.input(&b, [1000], false)?;
            assert_ne!(run, panics_in);
            tape.read(x)
        })
        .unwrap()
    };
    for run in [1, 2] {
        panics(|| read(run));
        check_add();
        assert_eq!(read(0), b);
    }

    panics(|| device.capture(|device| add_on(device).map(|()| panic!())));
    check_add();
    device.capture(add_on).unwrap();

    panics(|| device.time_launches(|| panic!()));
    device.capture(add_on).unwrap();
    assert!(device.time_launches(|| Ok(())).unwrap().is_empty());
    check_add();
}

#[test]
fn memory_and_weights_must_be_in_one_place() {
    let [device, other] = [(); 2].map(|()| Arc::new(device()));
    let host = vec![0.5; 8];
    let weights = DeviceWeights::upload(&device, &host, DType::F32).unwrap();
    let refused = |weights: Weights, memory: &mut Memory| {
        let error = infer(weights, memory, |_| Ok(())).unwrap_err();
        assert!(matches!(error, dtr_fused::Error::Usage(_)), "{error}");
        error.to_string()
    };
    let mut of_other = Memory::on_device(&other, DType::F32);
    assert!(refused((&weights).into(), &mut of_other).contains("another device"));
    assert!(refused((&weights).into(), &mut Memory::new()).contains("for passes on the CPU"));
    assert!(refused((&host).into(), &mut of_other).contains("for passes on a CUDA device"));
    infer((&weights).into(), &mut Memory::on_device(&device, DType::F32), |_| Ok(())).unwrap();
    infer((&host).into(), &mut Memory::new(), |_| Ok(())).unwrap();
}

#[test]
fn memory_of_another_device_is_refused() {
    let [device, other] = [(); 2].map(|()| Arc::new(device()));
    let paper = Arc::new(Device::on_paper(device.name(), device.arch(), device.multiprocessors()));
    let own = device.upload(&[1.0, 2.0], DType::F32).unwrap();
    let weights = DeviceWeights::upload(&device, &[0.5; 8], DType::F32).unwrap();
    let mut memory = Memory::on_device(&device, DType::F32);
    for foreign in [other.upload(&[3.0, 4.0], DType::F32).unwrap(), paper.upload(&[3.0, 4.0], DType::F32).unwrap()] {
        let refused = [
            device.write(&foreign, &[5.0, 6.0]),
            device.write_bytes(&foreign, &[0; 8]),
            device.read_bytes(&mut [0; 8], &foreign),
            device.download(&foreign).map(|_| ()),
            device.copy(&own, &foreign),
            device.copy(&foreign, &own),
            device.fill_bytes(&foreign, 0),
            pass(&weights, Some((&foreign, false)), &mut memory, |_| Ok(())),
        ];
        for result in refused {
            let says = result.unwrap_err().to_string();
            assert!(says.contains("2 numbers is not that of this device"), "{says}");
        }
    }
    assert_eq!(device.download(&own).unwrap(), [1.0, 2.0]);
    // More bytes than can be counted are not few.
    assert!(device.alloc(usize::MAX / 4 + 2, DType::F32).is_err());
    assert!(device.capture(|device| device.alloc(1, DType::F32).map(|_| ())).is_err());
}

/// What a pass planned is all the memory it has.
#[test]
fn a_pass_that_takes_more_than_it_planned_fails() {
    let device = Arc::new(device());
    let weights = DeviceWeights::upload(&device, &[0.5; 8], DType::F32).unwrap();
    let mut memory = Memory::on_device(&device, DType::F32);
    let x = numbers(1, 1 << 16);
    let mut sizes = |sizes: [usize; 2]| {
        let mut run = 0;
        pass(&weights, None, &mut memory, |tape| {
            // Planned twice: the first time finds how much there must be.
            let len = sizes[usize::from(run == 2)];
            run += 1;
            let first = tape.input(&x[..len], [len], false)?;
            tape.read(first)
        })
    };
    let says = sizes([8, 1 << 16]).unwrap_err().to_string();
    assert!(says.contains("more device memory than it had planned"), "{says}");
    assert_eq!(sizes([1 << 16; 2]).unwrap(), x);
}

#[test]
fn wrong_arguments_are_refused() {
    let device = device();
    let x = Output::with(&device, &[1.0; 8], DType::F32);
    let buffer = x.buffer();
    let launch =
        |kernel, elem| Launch { file: "tensor", kernel, elem, defines: &[], grid: [1; 3], block: 32, shared: 0 };
    // SAFETY: nothing is launched.
    let refused = |launch: Launch, args: &[Arg]| unsafe { device.launch(&launch, args) }.unwrap_err().to_string();
    let good = launch("tensor_add", DType::F32);
    assert!(refused(good, &[buffer.into(), buffer.into()]).contains("got 2 arguments, expected 3"));
    assert!(refused(good, &[buffer.into(), buffer.into(), Arg::I32(8)]).contains("the argument n is I32(8)"));
    let bf16 = launch("tensor_add", DType::Bf16);
    assert!(refused(bf16, &[buffer.into(), buffer.into(), Arg::U64(8)]).contains("the argument to is"));
    assert!(refused(launch("tensor_sub", DType::F32), &[]).contains("no such kernel"));
    let empty = Launch { grid: [0, 1, 1], ..good };
    assert!(refused(empty, &[buffer.into(), buffer.into(), Arg::U64(8)]).contains("no threads"));
}

#[test]
fn matrices_that_cannot_be_copied_are_refused() {
    let device = device();
    let [floats, elems] = [DType::F32, DType::Bf16].map(|dtype| device.alloc(4096, dtype).unwrap());
    let (uv, weight) = (floats.buffer(), elems.buffer());
    let launch = Launch {
        file: "ln_linear",
        kernel: "ln_linear_fwd_inactive",
        elem: DType::Bf16,
        defines: &[("TILE_M", 64), ("TILE_N", 64)],
        grid: [1; 3],
        block: 128,
        shared: 0,
    };
    let refused = |map: Arg| {
        let sizes = [Arg::I32(1), Arg::I32(64), Arg::I32(64)];
        let args = [uv.into(), weight.into(), weight.into(), Arg::Map(None), map];
        // SAFETY: nothing is launched.
        unsafe { device.launch(&launch, &[&args[..], &sizes].concat()) }.unwrap_err().to_string()
    };
    let matrix = Matrix { buffer: weight, rows: 64, columns: 64 };
    let says = |matrix| refused(Arg::Map(Some(matrix)));
    assert!(refused(weight.into()).contains("the argument weight_map is Buffer"));
    assert!(says(Matrix { rows: 65, ..matrix }).contains("weight_map: a matrix of 65 x 64 in 4096 numbers"));
    assert!(says(Matrix { rows: usize::MAX, ..matrix }).contains("in 4096 numbers"));
    assert!(says(Matrix { columns: 60, ..matrix }).contains("rows of 60 Bf16"));
    assert!(says(Matrix { buffer: uv, ..matrix }).contains("rows of 64 F32"));
    let odd = Buffer::from_raw(weight.address() + 2, weight.len(), weight.dtype());
    assert!(says(Matrix { buffer: odd, ..matrix }).contains("a multiple of 16"));
}
