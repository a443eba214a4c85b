//! Batches in a fixed order, made ready in background threads while the model computes.

use std::any::Any;
use std::collections::{HashSet, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use rayon::ThreadPool;
use rayon::prelude::*;

use super::Dataset;
use crate::error::{Error, Result};
use crate::rng::{Philox, Stream};

/// Batches that are made ahead of the one in use.
const AHEAD: usize = 2;

/// Warnings about damaged samples that are kept until somebody takes them; further ones are only counted.
const WARNINGS: usize = 16;

/// Most threads that read and decode.
const MOST_THREADS: usize = 1024;

/// How a [`Loader`] makes batches.
#[derive(Clone, Copy, Debug)]
pub struct LoaderOptions {
    /// Samples per batch.
    pub batch: usize,
    /// Seed of the order, of the flips and of the draws of latents.
    pub seed: u64,
    /// Mirror each sample with probability 1/2.
    pub flip: bool,
    /// Threads that read and decode, at most 1024; 0 is one per processor, at most 8.
    pub threads: usize,
}

/// Gives the batch of any step, the next ones already waiting.
///
/// Sample `i` of step `s` is number `n = s * batch + i` of the run: number `n % len` of epoch `n / len`. Each epoch has its
/// own order, drawn by counter like the flips; so a batch depends on the seed and the step alone, and a resumed run sees
/// what an uninterrupted one sees.
///
/// A sample that is a distribution ([`Dataset::read_std`]) is drawn from it: its mean plus, times its standard deviations,
/// normal numbers that the seed and `n` alone decide. So each epoch has other draws.
///
/// A sample that cannot be read is counted, named once ([`take_warnings`](Self::take_warnings)) and replaced by the next
/// good one of the data set ([`Batch::replaced`]). When more than half of the samples are bad, that is an error.
pub struct Loader {
    source: Arc<Source>,
    batch: usize,
    jobs: Option<SyncSender<Job>>, // None only while the loader is dropped
    done: Receiver<Result<Job>>,
    requested: VecDeque<u64>, // steps of the jobs under way, in order
    home: SyncSender<Buffers>,
    free: Receiver<Buffers>,
    buffers: usize, // how many were made
    worker: Option<JoinHandle<()>>,
}

/// One batch. When it is dropped, its memory goes back to the loader.
#[derive(Debug)]
pub struct Batch {
    /// `[B, C, H, W]`: images in [-1, 1], latents as they are or were drawn.
    pub pixels: Vec<f32>,
    /// `[B]`: classes, below the data set's number of classes.
    pub labels: Vec<u32>,
    /// `[B]`: whether another sample is there in place of one that cannot be read.
    pub replaced: Vec<bool>,
    home: SyncSender<Buffers>,
}

#[derive(Default)]
struct Buffers {
    pixels: Vec<f32>,
    labels: Vec<u32>,
    replaced: Vec<bool>,
}

struct Job {
    step: u64,
    buffers: Buffers,
}

impl Drop for Batch {
    fn drop(&mut self) {
        let buffers = Buffers {
            pixels: std::mem::take(&mut self.pixels),
            labels: std::mem::take(&mut self.labels),
            replaced: std::mem::take(&mut self.replaced),
        };
        // Fails when the loader is gone or has enough: then the memory is simply freed.
        let _ = self.home.try_send(buffers);
    }
}

impl Loader {
    /// Starts the threads; the first batch is made when it is asked for.
    ///
    /// # Errors
    /// [`Error::Usage`] when the batch is empty or too large for memory to be addressed, the data set is empty or has more
    /// than `u32::MAX` samples, or there are too many threads; [`Error::Stopped`] when the system refuses to start threads.
    pub fn new(dataset: Arc<dyn Dataset>, options: LoaderOptions) -> Result<Self> {
        let LoaderOptions { batch, seed, flip, threads } = options;
        if batch == 0 {
            return Err(Error::usage("batch_size is 0; a batch needs at least 1 sample"));
        }
        if dataset.is_empty() || u32::try_from(dataset.len()).is_err() {
            return Err(Error::usage(format!("a data set of {} samples cannot be used", dataset.len())));
        }
        if threads > MOST_THREADS {
            return Err(Error::usage(format!(
                "{threads} threads are to read the data: give at most {MOST_THREADS}, or 0"
            )));
        }
        let sample = dataset.shape().iter().fold(1, |sample: usize, &size| sample.saturating_mul(size));
        if sample == 0 || sample.checked_mul(batch).is_none_or(|n| n > isize::MAX as usize / size_of::<f32>()) {
            return Err(Error::usage(format!("{batch} samples of {:?} cannot be one batch", dataset.shape())));
        }
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = if threads == 0 { processors.min(8) } else { threads };
        let refused = |e: &dyn std::fmt::Display| {
            Error::Stopped(format!("the threads that read the data cannot be started: {e}"))
        };
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).thread_name(|i| format!("data-{i}")).build();
        let pool = pool.map_err(|e| refused(&e))?;

        let draws = Philox::new(seed, Stream::Latent);
        let source = Arc::new(Source { dataset, draws, bad: Mutex::default(), stop: AtomicBool::new(false) });
        let (jobs, todo) = sync_channel(AHEAD);
        let (finished, done) = sync_channel(AHEAD);
        let (home, free) = sync_channel(AHEAD + 1);
        let mut maker = Maker::new(source.clone(), pool, seed, batch, flip);
        let worker = std::thread::Builder::new().name("data".into()).spawn(move || {
            while let Ok(job) = todo.recv() {
                if finished.send(maker.make(job)).is_err() {
                    break;
                }
            }
        });
        let worker = Some(worker.map_err(|e| refused(&e))?);
        let requested = VecDeque::with_capacity(AHEAD);
        Ok(Loader { source, batch, jobs: Some(jobs), done, requested, home, free, buffers: 0, worker })
    }

    /// The batch of `step`. Fast when the steps are asked for in order; any other step starts over from there.
    ///
    /// # Errors
    /// [`Error::Stopped`] when more than half of the samples cannot be read, the data set gives a sample a label that is no class of it,
    /// or it panics.
    pub fn next(&mut self, step: u64) -> Result<Batch> {
        while self.requested.front().is_some_and(|&first| first != step) {
            if let Ok(job) = self.receive()? {
                let _ = self.home.try_send(job.buffers);
            }
        }
        let mut ahead = self.requested.back().map_or(step, |last| last.wrapping_add(1));
        while self.requested.len() < AHEAD {
            let buffers = match self.free.try_recv() {
                Ok(buffers) => buffers,
                // With nothing under way there must be a new one, however many batches the caller keeps.
                Err(_) if self.buffers <= AHEAD || self.requested.is_empty() => {
                    self.buffers += 1;
                    Buffers::default()
                }
                Err(_) => break,
            };
            let jobs = self.jobs.as_ref().ok_or_else(died)?;
            jobs.send(Job { step: ahead, buffers }).map_err(|_| died())?;
            self.requested.push_back(ahead);
            ahead = ahead.wrapping_add(1);
        }
        let Job { buffers, .. } = self.receive()??;
        let Buffers { pixels, labels, replaced } = buffers;
        Ok(Batch { pixels, labels, replaced, home: self.home.clone() })
    }

    /// The data set.
    pub fn dataset(&self) -> &Arc<dyn Dataset> {
        &self.source.dataset
    }

    /// Samples per batch.
    pub fn batch_size(&self) -> usize {
        self.batch
    }

    /// How many damaged samples were met so far, counting the batches that were made ahead: for display only, it depends on
    /// how far ahead the threads are.
    pub fn bad_samples(&self) -> usize {
        self.source.bad().indices.len()
    }

    /// One sentence for each damaged sample met since the last call (the first few of many).
    pub fn take_warnings(&self) -> Vec<String> {
        std::mem::take(&mut self.source.bad().warnings)
    }

    /// Waits for the oldest job. The outer error is a dead thread, the inner one that of the job.
    fn receive(&mut self) -> Result<Result<Job>> {
        self.requested.pop_front();
        self.done.recv().map_err(|_| died())
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        self.source.stop.store(true, Ordering::Relaxed);
        self.jobs = None;
        if let Some(worker) = self.worker.take() {
            // A worker that panicked has said so itself.
            let _ = worker.join();
        }
    }
}

fn died() -> Error {
    Error::Stopped("the thread that reads the data has died; this is a bug, please report it".into())
}

/// What a panic says, if it says something.
fn text_of(panic: &dyn Any) -> Option<&str> {
    panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str))
}

/// The order of the samples: one permutation per epoch (Fisher and Yates), made anew when the epoch changes.
struct Order {
    rng: Philox,
    epoch: Option<u64>,
    permutation: Vec<u32>, // [len]
}

impl Order {
    /// Index of sample number `n` of the run.
    fn index(&mut self, n: u64) -> usize {
        let len = self.permutation.len() as u64;
        let epoch = n / len;
        if self.epoch != Some(epoch) {
            self.epoch = Some(epoch);
            self.permutation.iter_mut().zip(0..).for_each(|(place, i)| *place = i);
            for i in (1..self.permutation.len()).rev() {
                let other = self.rng.below(i as u64 + 1, epoch, 0, i as u32) as usize;
                self.permutation.swap(i, other);
            }
        }
        self.permutation[(n % len) as usize] as usize
    }
}

/// What is read for one place of a batch.
#[derive(Clone, Copy)]
struct Planned {
    n: u64,       // number of the sample in the run
    index: usize, // and in the data set
    flip: bool,
}

/// Makes whole batches; lives in the worker thread.
struct Maker {
    source: Arc<Source>,
    pool: ThreadPool,
    batch: usize,
    order: Order,
    flips: Option<Philox>,
    plan: Vec<Planned>, // [B]
}

impl Maker {
    fn new(source: Arc<Source>, pool: ThreadPool, seed: u64, batch: usize, flip: bool) -> Self {
        let permutation = vec![0; source.dataset.len()];
        let order = Order { rng: Philox::new(seed, Stream::Shuffle), epoch: None, permutation };
        let flips = flip.then(|| Philox::new(seed, Stream::Flip));
        Maker { source, pool, batch, order, flips, plan: Vec::with_capacity(batch) }
    }

    fn make(&mut self, mut job: Job) -> Result<Job> {
        let first = job.step.wrapping_mul(self.batch as u64);
        self.plan.clear();
        for i in 0..self.batch as u64 {
            let n = first.wrapping_add(i);
            let flip = self.flips.is_some_and(|rng| rng.block(0, n >> 32, n as u32)[0] & 1 == 1);
            self.plan.push(Planned { n, index: self.order.index(n), flip });
        }
        let sample = self.source.dataset.shape().iter().product::<usize>();
        let Buffers { pixels, labels, replaced } = &mut job.buffers;
        pixels.resize(self.batch * sample, 0.0);
        labels.resize(self.batch, 0);
        replaced.resize(self.batch, false);
        let (source, plan) = (&self.source, &self.plan);
        self.pool.install(|| {
            let places = pixels.par_chunks_mut(sample).zip(labels.par_iter_mut()).zip(replaced.par_iter_mut());
            places.zip(plan.par_iter()).try_for_each(|(((pixels, label), replaced), &planned)| {
                let (index, read) = source.read(planned, pixels)?;
                (*label, *replaced) = (read, index != planned.index);
                Ok(())
            })
        })?;
        Ok(job)
    }
}

/// The data set and what is known to be wrong with it.
struct Source {
    dataset: Arc<dyn Dataset>,
    draws: Philox, // from samples that are distributions
    bad: Mutex<Bad>,
    stop: AtomicBool,
}

#[derive(Default)]
struct Bad {
    indices: HashSet<usize>,
    warnings: Vec<String>,
    /// Why no more is read, once more than half of the samples are bad.
    too_many: Option<String>,
}

impl Source {
    fn bad(&self) -> MutexGuard<'_, Bad> {
        self.bad.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads the first good sample at or after the one that is planned: which one depends on the data alone. Its index and its label are
    /// returned.
    fn read(&self, planned: Planned, out: &mut [f32]) -> Result<(usize, u32)> {
        let first = planned.index;
        let len = self.dataset.len();
        if let Some(why) = &self.bad().too_many {
            return Err(Error::Stopped(why.clone()));
        }
        for index in (first..len).chain(0..first) {
            if self.stop.load(Ordering::Relaxed) {
                break;
            }
            if self.bad().indices.contains(&index) {
                continue;
            }
            // A data set may be anybody's.
            match catch_unwind(AssertUnwindSafe(|| self.read_one(Planned { index, ..planned }, out))) {
                Ok(Ok(label)) => return Ok((index, self.check_label(index, label)?)),
                Ok(Err(e)) => self.leave_out(index, &e)?,
                Err(panic) => {
                    let said = text_of(&*panic).map_or(String::new(), |said| format!(": {said}"));
                    let number = self.dataset.number_of(index);
                    return Err(Error::Stopped(format!("the data set panicked when it read sample {number}{said}")));
                }
            }
        }
        Err(Error::Stopped(format!("none of the {len} samples can be read")))
    }

    /// Reads one sample; of a distribution, draws it.
    fn read_one(&self, Planned { n, index, flip }: Planned, out: &mut [f32]) -> Result<u32> {
        let drawn = self.dataset.read_std(index, flip, out)?.then(|| {
            let mut drawn = vec![0.0; out.len()];
            self.draws.normal(&mut drawn, 0, n);
            drawn.iter_mut().zip(&*out).for_each(|(z, std)| *z *= std);
            drawn
        });
        let label = self.dataset.read(index, flip, out)?;
        if let Some(drawn) = drawn {
            out.iter_mut().zip(drawn).for_each(|(x, z)| *x += z);
        }
        Ok(label)
    }

    /// The label of sample `index`, which must be a class.
    fn check_label(&self, index: usize, label: u32) -> Result<u32> {
        let classes = self.dataset.num_classes();
        if (label as usize) < classes {
            return Ok(label);
        }
        Err(Error::Stopped(format!(
            "sample {} has the label {label}, but the data set has {classes} classes, from 0 on",
            self.dataset.number_of(index)
        )))
    }

    fn leave_out(&self, index: usize, why: &Error) -> Result<()> {
        let mut bad = self.bad();
        // Two threads may have met the same one.
        if bad.indices.insert(index) && bad.warnings.len() < WARNINGS {
            bad.warnings.push(why.to_string());
        }
        let (count, len) = (bad.indices.len(), self.dataset.len());
        if count > len / 2 {
            let why = format!("{count} of {len} samples cannot be read, the last: {why}");
            bad.too_many = Some(why.clone());
            return Err(Error::Stopped(why));
        }
        Ok(())
    }
}
