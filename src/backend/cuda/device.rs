//! A CUDA device and its compiled kernels. All work goes to one stream, in order.

use super::clock::Timed;
use super::launch::{Arg, Launch, Matrix};
use super::{DType, cache, library, nvrtc};
use crate::error::{Error, Result};
use cudarc::driver::{CudaContext, CudaFunction, CudaModule, CudaStream, DriverError, result, sys};
use rayon::prelude::*;
use std::collections::{HashMap, HashSet};
use std::ffi::c_void;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

/// Oldest supported architecture: bf16 products and asynchronous copies came with it.
const OLDEST_ARCH: u32 = 80;

/// Oldest supported CUDA version of the driver: NVRTC 13.0 compiles for it.
const OLDEST_DRIVER: i32 = 13_000;

/// Dynamic shared memory that needs no permission: of 48 KB in all, kernels have some of their own.
const SHARED_WITHOUT_ASKING: u32 = 47 << 10;

/// Says what failed.
pub(crate) fn failed(what: &str, e: DriverError) -> Error {
    let text = e.error_string().ok().map(|s| s.to_string_lossy().into_owned());
    Error::Stopped(format!("the CUDA device failed to {what}: {}", text.unwrap_or_else(|| format!("{:?}", e.0))))
}

/// Binds a context to this thread. cudarc's own way does not where it has an error of before to return.
pub(super) fn bind(context: &CudaContext) -> std::result::Result<(), DriverError> {
    // SAFETY: the context lives.
    unsafe { result::ctx::set_current(context.cu_ctx()) }
}

const NO_MAP: sys::CUtensorMap = sys::CUtensorMap { opaque: [0; 16] };

/// How tensor copies find squares of 64 by 64 of a matrix, in the 128-byte swizzle, with zeros beyond.
fn tensor_map(matrix: Matrix) -> Result<sys::CUtensorMap> {
    let Matrix { buffer, rows, columns } = matrix;
    let mut map = NO_MAP;
    let sizes = [columns as u64, rows as u64];
    let stride = [columns as u64 * buffer.dtype.bytes() as u64];
    let (square, steps) = ([64, 64], [1, 1]);
    // SAFETY: the arrays have as many numbers as there are dimensions (strides one fewer), and the map is aligned by its type.
    unsafe {
        sys::cuTensorMapEncodeTiled(
            &mut map,
            sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            2,
            buffer.address as *mut c_void,
            sizes.as_ptr(),
            stride.as_ptr(),
            square.as_ptr(),
            steps.as_ptr(),
            sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
            sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
            sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    }
    .result()
    .map_err(|e| failed(&format!("describe a matrix of {rows} x {columns}"), e))?;
    Ok(map)
}

/// The newest CUDA version that the driver knows: 13000 for 13.0.
fn driver_version() -> std::result::Result<i32, DriverError> {
    let mut version = 0;
    // SAFETY: a valid place to write to.
    unsafe { sys::cuDriverGetVersion(&mut version) }.result()?;
    Ok(version)
}

/// Refuses drivers that take nothing that NVRTC 13 compiles.
fn check_driver(version: i32) -> Result<()> {
    let (major, minor) = (version / 1000, version % 1000 / 10);
    match version < OLDEST_DRIVER {
        true => Err(Error::usage(format!(
            "the CUDA driver of this machine knows CUDA {major}.{minor}, but the kernels are compiled for 13.0: update the \
             driver to 580 or newer"
        ))),
        false => Ok(()),
    }
}

/// Compute capability as one number; refuses what is too old.
fn check_arch(name: &str, major: i32, minor: i32) -> Result<u32> {
    let arch = (major * 10 + minor) as u32;
    match arch < OLDEST_ARCH {
        true => Err(Error::usage(format!(
            "{name} has compute capability {major}.{minor}, but the kernels need 8.0 or newer (an A100, an RTX 30 card, or \
             later): give --device cpu"
        ))),
        false => Ok(arch),
    }
}

/// What a module is compiled from: a file, its `elem` and its definitions.
pub(crate) type ModuleKey = (&'static str, DType, Vec<(&'static str, i64)>);

struct Loaded {
    module: Arc<CudaModule>,
    functions: HashMap<&'static str, (CudaFunction, u32)>, // with the dynamic shared memory it is allowed
}

/// A launch that was made, for those who count them.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Recorded {
    /// `attention` for `kernels/attention.cu`.
    pub file: &'static str,
    /// The kernel's name.
    pub kernel: &'static str,
    /// What `elem` is in the kernel.
    pub elem: DType,
    /// `-D` definitions.
    pub defines: Vec<(&'static str, i64)>,
    /// Blocks in x, y and z.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: u32,
    /// Bytes of dynamic shared memory.
    pub shared: u32,
}

impl Recorded {
    /// The module that the kernel is in.
    pub(crate) fn module(&self) -> ModuleKey {
        (self.file, self.elem, self.defines.clone())
    }
}

pub(super) struct Driver {
    pub(super) context: Arc<CudaContext>,
    pub(super) stream: Arc<CudaStream>,
    pub(super) copies: Arc<CudaStream>, // of inputs for later
}

/// A CUDA device.
pub struct Device {
    pub(super) driver: Option<Driver>, // None: on paper
    pub(super) name: String,
    arch: u32,
    multiprocessors: u32,
    pub(super) captures: bool, // what is given to its stream becomes a graph
    pub(super) common: Arc<Common>,
}

/// What a device has in common with its copies: those on paper, and those whose work is captured.
#[derive(Default)]
pub(super) struct Common {
    modules: Mutex<HashMap<ModuleKey, Loaded>>,
    recorded: Mutex<Option<Vec<Recorded>>>,
    pub(super) timed: Mutex<Option<Vec<Timed>>>, // None: launches are not timed
    launches: AtomicUsize,
    ptx_only: AtomicBool,                 // the driver takes no machine code
    pub(super) next_address: AtomicUsize, // on paper
}

impl Device {
    /// Opens device number `ordinal`.
    ///
    /// # Errors
    /// When there is no driver or no such device, and as [`Device::on_stream`].
    pub fn open(ordinal: usize) -> Result<Self> {
        library::load_driver()?;
        let refused = |e: DriverError| {
            let text = e.error_string().ok().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
            Error::usage(format!("CUDA device {ordinal} cannot be opened: {text}"))
        };
        result::init().map_err(refused)?;
        let count = CudaContext::device_count().map_err(refused)?;
        if ordinal >= count.max(0) as usize {
            return Err(Error::usage(format!("there is no CUDA device {ordinal}: the driver sees {count}")));
        }
        let context = CudaContext::new(ordinal).map_err(refused)?;
        // SAFETY: all memory of this context is used on one stream, or between events of our own.
        unsafe { context.disable_event_tracking() };
        // Graphs are captured from a stream of one's own.
        Self::on_stream(context.new_stream().map_err(refused)?)
    }

    /// The device of a stream that the caller made: all its work goes there, in order with the caller's.
    ///
    /// Memory of the same context can be used with [`Device::buffer`]. cudarc's events do not see this device's work: what
    /// is used on other streams too must be synchronised by the caller.
    ///
    /// Before the first call of cudarc, with which the stream is made, [`load_driver`](super::load_driver) should be called: it finds
    /// the library, also where `DTR_CUDA_LIBRARY` says, or tells what is missing, where cudarc panics.
    ///
    /// # Errors
    /// When the driver is older than CUDA 13.0, the device older than an A100 (compute capability 8.0), or the driver refuses.
    pub fn on_stream(stream: Arc<CudaStream>) -> Result<Self> {
        const PER_THREAD: usize = 2;
        if stream.cu_stream() as usize == PER_THREAD {
            return Err(Error::usage("the per-thread stream is another one on each thread: give a stream of its own"));
        }
        let refused = |e| failed("be opened", e);
        check_driver(driver_version().map_err(refused)?)?;
        let context = stream.context().clone();
        let name = context.name().map_err(refused)?;
        let (major, minor) = context.compute_capability().map_err(refused)?;
        let arch = check_arch(&name, major, minor)?;
        let multiprocessors = context
            .attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)
            .map_err(refused)? as u32;
        let copies = context.new_stream().map_err(refused)?;
        let driver = Some(Driver { context, stream, copies });
        Ok(Device { driver, ..Device::on_paper(&name, arch, multiprocessors) })
    }

    /// A device that exists on paper only: passes over it are planned, and their launches recorded, but nothing runs.
    pub fn on_paper(name: &str, arch: u32, multiprocessors: u32) -> Self {
        Device {
            driver: None,
            name: name.to_string(),
            arch,
            multiprocessors,
            captures: false,
            common: Arc::new(Common { next_address: AtomicUsize::new(1 << 20), ..Common::default() }),
        }
    }

    /// This device on paper: launches are checked, counted and recorded as its own, but nothing runs and nothing is compiled.
    pub(crate) fn copy_on_paper(&self) -> Self {
        self.copy_with(None, false)
    }

    /// This device on another stream, which may capture a graph, or on paper.
    pub(super) fn copy_with(&self, driver: Option<Driver>, captures: bool) -> Self {
        let Device { ref name, arch, multiprocessors, ref common, .. } = *self;
        Device { driver, name: name.clone(), arch, multiprocessors, captures, common: common.clone() }
    }

    /// What the driver calls it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Compute capability, 80 for 8.0.
    pub fn arch(&self) -> u32 {
        self.arch
    }

    /// The device as if it had this many multiprocessors: with few of them small products take the tiles of large ones.
    #[must_use]
    pub fn with_multiprocessors(self, multiprocessors: u32) -> Self {
        Device { multiprocessors, ..self }
    }

    /// Number of multiprocessors.
    pub fn multiprocessors(&self) -> u32 {
        self.multiprocessors
    }

    /// The stream that everything runs on; None on paper.
    pub fn stream(&self) -> Option<&Arc<CudaStream>> {
        self.driver.as_ref().map(|driver| &driver.stream)
    }

    /// Context, stream of the kernels, stream of copies for later; None on paper.
    pub(super) fn streams(&self) -> Option<(&Arc<CudaContext>, &Arc<CudaStream>, &Arc<CudaStream>)> {
        self.driver.as_ref().map(|driver| (&driver.context, &driver.stream, &driver.copies))
    }

    /// Whether nothing can run here.
    pub fn is_on_paper(&self) -> bool {
        self.driver.is_none()
    }

    /// Whether this is the driver simulator, whose times say nothing about a GPU.
    pub fn is_simulated(&self) -> bool {
        self.name.starts_with("CUDA simulator")
    }

    /// Starts to record launches, those of dry passes included; what was recorded so far is returned.
    pub fn record(&self) -> Vec<Recorded> {
        let mut recorded = self.common.recorded.lock().unwrap_or_else(|e| e.into_inner());
        recorded.replace(Vec::new()).unwrap_or_default()
    }

    /// The driver, bound to this thread; None on paper.
    pub(super) fn running(&self) -> Result<Option<&Driver>> {
        if let Some(driver) = &self.driver {
            driver.context.bind_to_thread().map_err(|e| failed("be used", e))?;
        }
        Ok(self.driver.as_ref())
    }

    /// Launches so far, those of dry passes included; a graph counts those it replays when it was captured.
    pub fn launches(&self) -> usize {
        self.common.launches.load(Ordering::Relaxed)
    }

    /// Waits for all work.
    ///
    /// # Errors
    /// When any of it failed.
    pub fn synchronize(&self) -> Result<()> {
        let Some(Driver { context, stream, .. }) = &self.driver else { return Ok(()) };
        // SAFETY: the stream lives, in this context.
        let done = bind(context).and_then(|()| unsafe { result::stream::synchronize(stream.cu_stream()) });
        // Others rely on the wait: what was recorded before must not stand in for it.
        done.and(context.check_err()).map_err(|e| failed("finish its work", e))
    }

    /// Runs a kernel, compiling it first where needed. It returns before the kernel ends.
    ///
    /// # Safety
    /// The kernel must find memory wherever its arguments lead it: all buffers are as [`Buffer`](super::Buffer) says, and as large as
    /// the sizes that it is given say; what it reads as an index (a window, a label, a plan, a counter that is to be 0 before) is one; grid,
    /// block, shared memory and definitions are those that it is written for (the head of each file in `kernels/` says them).
    ///
    /// # Errors
    /// When the arguments are not the kernel's, it does not compile, or the device refuses the launch.
    pub unsafe fn launch(&self, launch: &Launch, args: &[Arg]) -> Result<()> {
        launch.check(args)?;
        self.common.launches.fetch_add(1, Ordering::Relaxed);
        if let Some(recorded) = &mut *self.common.recorded.lock().unwrap_or_else(|e| e.into_inner()) {
            let Launch { file, kernel, elem, defines, grid, block, shared } = *launch;
            recorded.push(Recorded { file, kernel, elem, defines: defines.to_vec(), grid, block, shared });
        }
        let Some(driver) = self.running()? else { return Ok(()) };
        let function = self.function(driver, launch)?;
        let maps = args
            .iter()
            .filter_map(
                |arg| if let Arg::Map(matrix) = arg { Some(matrix.map_or(Ok(NO_MAP), tensor_map)) } else { None },
            )
            .collect::<Result<Vec<_>>>()?;
        let mut next_map = maps.iter();
        let mut parameters: Vec<*mut c_void> = args
            .iter()
            .map(|arg| match arg {
                Arg::Buffer(buffer) => (&raw const buffer.address).cast_mut().cast(),
                Arg::Map(_) => {
                    (&raw const *next_map.next().expect("one for each such argument")).cast_mut().cast::<c_void>()
                }
                Arg::I32(value) => (&raw const *value).cast_mut().cast(),
                Arg::U32(value) => (&raw const *value).cast_mut().cast(),
                Arg::F32(value) => (&raw const *value).cast_mut().cast(),
                Arg::F64(value) => (&raw const *value).cast_mut().cast(),
                Arg::U64(value) => (&raw const *value).cast_mut().cast(),
            })
            .collect();
        let grid = (launch.grid[0], launch.grid[1], launch.grid[2]);
        self.between_moments(launch, || {
            let (block, stream) = ((launch.block, 1, 1), driver.stream.cu_stream());
            // SAFETY: number, kinds and order of the arguments are those of the kernel (checked above), and they live until the
            // call has copied them. That the kernel finds memory where it looks is the caller's promise.
            unsafe {
                result::launch_kernel(function.cu_function(), grid, block, launch.shared, stream, &mut parameters)
            }
            .map_err(|e| failed(&format!("run {}", launch.kernel), e))
        })
    }

    /// The compiled kernel of a launch.
    fn function(&self, driver: &Driver, launch: &Launch) -> Result<CudaFunction> {
        let mut modules = self.common.modules.lock().unwrap_or_else(|e| e.into_inner());
        let key = (launch.file, launch.elem, launch.defines.to_vec());
        let loaded = match modules.entry(key) {
            std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::hash_map::Entry::Vacant(entry) => {
                let module = self.load(driver, launch.file, self.compile(entry.key())?)?;
                entry.insert(Loaded { module, functions: HashMap::new() })
            }
        };
        if let Some((function, shared)) = loaded.functions.get(launch.kernel)
            && *shared >= launch.shared
        {
            return Ok(function.clone());
        }
        let what = || format!("load {}", launch.kernel);
        let function = loaded.module.load_function(launch.kernel).map_err(|e| failed(&what(), e))?;
        let allowed = launch.shared.max(SHARED_WITHOUT_ASKING);
        if allowed > SHARED_WITHOUT_ASKING {
            let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            function
                .set_attribute(attribute, allowed as i32)
                .map_err(|e| failed(&format!("give {} {allowed} bytes of shared memory", launch.kernel), e))?;
        }
        loaded.functions.insert(launch.kernel, (function.clone(), allowed));
        Ok(function)
    }

    /// Makes the kernels of `launches` ready, compiled on all threads: one after the other, as they are launched, those that are
    /// not kept from an earlier time take half a minute.
    ///
    /// # Errors
    /// When one does not compile, or the device refuses it.
    pub fn prepare(&self, launches: &[Recorded]) -> Result<()> {
        let Some(driver) = self.running()? else { return Ok(()) };
        let mut keys: HashSet<ModuleKey> = launches.iter().map(Recorded::module).collect();
        let lock = || self.common.modules.lock().unwrap_or_else(|e| e.into_inner());
        let loaded = lock();
        keys.retain(|key| !loaded.contains_key(key));
        drop(loaded);
        let compiled = self.compile_all(keys)?;
        let mut modules = lock();
        for (key, compiled) in compiled {
            let module = self.load(driver, key.0, compiled)?;
            modules.entry(key).or_insert(Loaded { module, functions: HashMap::new() });
        }
        Ok(())
    }

    /// Compiles modules on all threads.
    pub(crate) fn compile_all(&self, keys: HashSet<ModuleKey>) -> Result<Vec<(ModuleKey, nvrtc::Compiled)>> {
        let mut keys: Vec<ModuleKey> = keys.into_iter().collect();
        // Files of products are the longest, and first; one at a time: else a thread ends with seconds of work that no other
        // helps it with.
        keys.sort_by_key(|(file, ..)| std::cmp::Reverse(nvrtc::source(file).map_or(0, str::len)));
        let compiled = keys.into_par_iter().with_max_len(1).map(|key| {
            let compiled = self.compile(&key)?;
            Ok((key, compiled))
        });
        compiled.collect()
    }

    /// Compiles a file, unless that was done on this machine before.
    fn compile(&self, (file, elem, defines): &ModuleKey) -> Result<nvrtc::Compiled> {
        let mut defines = defines.clone();
        if *elem == DType::Bf16 {
            defines.push(("ELEM_BF16", 1));
        }
        cache::compile(file, &nvrtc::options(self.arch, &defines))
    }

    /// Loads a compiled file: machine code, or PTX where the driver does not take that.
    fn load(&self, driver: &Driver, file: &str, compiled: nvrtc::Compiled) -> Result<Arc<CudaModule>> {
        let cannot = |e| failed(&format!("load kernels/{file}.cu"), e);
        if !self.common.ptx_only.load(Ordering::Relaxed) {
            match driver.context.load_module(cudarc::nvrtc::Ptx::from_binary(compiled.cubin)) {
                // Not of the kind that this driver runs, and neither will the next one be.
                Err(DriverError(sys::CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU)) => {
                    self.common.ptx_only.store(true, Ordering::Relaxed);
                }
                Err(_) => {}
                Ok(module) => return Ok(module),
            }
        }
        let text = String::from_utf8_lossy(&compiled.ptx).into_owned();
        driver.context.load_module(cudarc::nvrtc::Ptx::from_src(text)).map_err(cannot)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_too_old_is_told_so() {
        let error = check_arch("Tesla V100", 7, 0).unwrap_err();
        assert!(matches!(error, Error::Usage(_)));
        let says = error.to_string();
        assert!(says.starts_with("Tesla V100 has compute capability 7.0, but the kernels need 8.0"), "{says}");
        let says = check_driver(12_040).unwrap_err().to_string();
        assert!(says.starts_with("the CUDA driver of this machine knows CUDA 12.4, but"), "{says}");
        check_driver(13_000).unwrap();
        assert_eq!((check_arch("A100", 8, 0).unwrap(), check_arch("RTX 5090", 12, 0).unwrap()), (80, 120));
    }
}
