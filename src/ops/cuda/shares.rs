//! Even shares of a weight's gradient on a CUDA device (`kernels/gemm_shares.cuh`): which block computes what.
//!
//! The gradient is a few tiles with a long reduction over the rows of the batch. Where they would leave a quarter of the device idle,
//! as many blocks are launched as are resident at once, and each gets a list of pieces of about the same time in all. Else a block
//! computes a tile, those with the longest reductions first, and some sum the gradient of a bias. In shares:
//!
//! 1. Tiles are dealt out in turns. All blocks begin with the first row and are at about the same rows at any time, so that what they read
//!    is read from main memory once.
//! 2. What a block has beyond the common limit is cut off, and goes to the blocks that have less, in one line.
//! 3. The smallest limit at which everything finds a place is taken.
//!
//! The plan depends on the windows, so it is an input of the pass as they are; its length does not.

use crate::backend::cuda::{Buffer, DType, Device};
use crate::error::Result;
use crate::ops::check;
use crate::ops::cuda::tile::{Tile, Tiling, gradient_tiling};
use crate::routing::Window;
use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// Outputs of a piece that sums a bias's gradient (`kernels/ln_linear.cu`).
const BIAS_COLUMNS: usize = 64;
/// What storing a tile or a part of it takes, or adding a part, in chunks of the reduction.
const STORE: usize = 6;
/// Fewest chunks that a tile is cut by.
const LEAST: usize = 8;
/// Numbers of a piece in a plan (`Piece` in the kernels).
const WORDS: usize = 8;

/// A gradient `[rows, columns]` of a weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Gradient {
    /// Rows of the weight.
    pub(crate) rows: usize,
    /// Columns of the weight.
    pub(crate) columns: usize,
    /// Whether windows are of its rows (`linear_residual`) or else of its columns (`ln_linear`).
    pub(crate) windows_of_rows: bool,
    /// Samples.
    pub(crate) b: usize,
    /// Tokens of each.
    pub(crate) t: usize,
    /// Rows of the corrections for inactive channels: one more reduction each; none without windows.
    pub(crate) corrections: usize,
    /// Whether the gradient of a bias is summed beside it.
    pub(crate) bias: bool,
}

/// Device memory of the product of a weight's gradient.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shares {
    /// i32: the plan, an input.
    pub(crate) plan: Buffer,
    /// f32: sums of tiles that several blocks compute.
    pub(crate) parts: Buffer,
}

/// Lengths of [`Shares`], which depend on the device and the sizes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Lengths {
    /// Of [`Shares::plan`].
    pub(crate) plan: usize,
    /// Of [`Shares::parts`].
    pub(crate) parts: usize,
    /// What blocks tell each other: how many lists are taken, and for each part whether it is there.
    pub(crate) counters: usize,
}

/// How a gradient is computed on a device, whatever the windows are.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Planner {
    pub(crate) gradient: Gradient,
    pub(crate) tiling: Tiling,
    others: usize,  // tiles along the side that no window is of
    classes: usize, // tiles along the other
    cuts: bool,     // there are more blocks than tiles
}

/// A run of a tile's chunks, by their number among those that some window needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Piece {
    tile: usize,
    from: usize,
    to: usize,
    kind: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// The tile's sums, with those of `count` parts.
    Complete { first: usize, count: usize },
    /// Part number `part` of the tile.
    Part { part: usize },
    /// No tile: outputs of the bias, `tile` BIAS_COLUMNS on.
    Bias,
}

impl Piece {
    /// Its place among the pieces of a block, which computes those with the lowest first: tiles of its own that need nobody else, then what
    /// was cut off from the tiles of others, who may wait for it, then the bias, and at the end tiles that need parts from other blocks, so
    /// that these have the most time.
    fn turn(&self, is_own: bool) -> usize {
        match self.kind {
            Kind::Complete { count, .. } if count > 0 => 3,
            Kind::Complete { .. } if is_own => 0,
            Kind::Complete { .. } | Kind::Part { .. } => 1,
            Kind::Bias => 2,
        }
    }
}

/// What a block does.
#[derive(Clone, Debug, Default)]
struct Block {
    pieces: Vec<(usize, Piece)>, // with their turn
    load: usize,
    helps: bool, // has pieces of other blocks' tiles
    waits: bool, // for pieces of its own
}

/// Refuses windows that are not one a sample, inside of its channels.
pub(crate) fn check_windows(operation: &'static str, windows: &[Window], b: usize, channels: usize) -> Result<()> {
    check(windows.len() == b, operation, || format!("{} windows for {b} samples", windows.len()))?;
    windows.iter().try_for_each(|w| {
        check(w.fits(channels), operation, || format!("a window is {w:?}, but there are {channels} channels"))
    })
}

/// What a class of tiles reduces over.
struct Class {
    chunks: Vec<usize>, // that some window needs
    length: usize,      // and the corrections
}

impl Planner {
    pub(crate) fn new(device: &Device, elem: DType, gradient: Gradient) -> Self {
        let Gradient { rows, columns, windows_of_rows, b, t, .. } = gradient;
        let tiling = gradient_tiling(device, elem, [rows, columns], b * t, windows_of_rows);
        let [x, y] = [columns.div_ceil(tiling.tile.n), rows.div_ceil(tiling.tile.m)];
        let (others, classes) = if windows_of_rows { (x, y) } else { (y, x) };
        let mut planner = Planner { gradient, tiling, others, classes, cuts: tiling.grid[0] as usize > x * y };
        if !planner.cuts {
            // Blocks of their own for the bias.
            planner.tiling.grid[0] += planner.biases() as u32;
        }
        planner
    }

    fn tile(&self) -> Tile {
        self.tiling.tile
    }

    fn blocks(&self) -> usize {
        self.tiling.grid[0] as usize
    }

    fn tiles(&self) -> usize {
        self.others * self.classes
    }

    fn biases(&self) -> usize {
        if self.gradient.bias { self.gradient.rows.div_ceil(BIAS_COLUMNS) } else { 0 }
    }

    /// Chunks whose copies take as long as summing the rows of BIAS_COLUMNS outputs.
    fn bias_cost(&self) -> usize {
        let Tile { m, n, chunk, .. } = self.tile();
        ((self.gradient.b * self.gradient.t).div_ceil(chunk) * BIAS_COLUMNS).div_ceil(m + n)
    }

    /// The most that any windows need.
    pub(crate) fn lengths(&self) -> Lengths {
        let blocks = self.blocks();
        // A tile has at most a piece of its own block, one where each is begun, and one where each other block begins.
        let pieces = 2 * self.tiles() + blocks + self.biases();
        let Tile { m, n, .. } = self.tile();
        // One number where there are none: memory is never empty.
        let parts = if self.cuts { blocks * m * n } else { 1 };
        Lengths { plan: blocks + 1 + pieces * WORDS, parts, counters: 1 + blocks }
    }

    /// For each class of tiles what its reduction runs over. A chunk may hold rows of several samples.
    fn needed(&self, windows: &[Window]) -> Vec<Class> {
        let Gradient { rows, columns, windows_of_rows, b, t, corrections, .. } = self.gradient;
        let Tile { m, n, chunk, .. } = self.tile();
        let (side, channels) = if windows_of_rows { (m, rows) } else { (n, columns) };
        let of_chunks: Vec<Window> = (0..b * t)
            .step_by(chunk)
            .map(|row| {
                let samples = row / t..=((row + chunk).min(b * t) - 1) / t;
                windows[samples].iter().copied().reduce(Window::union).expect("a chunk has rows")
            })
            .collect();
        let class = |first: usize| {
            let end = (first + side).min(channels);
            let meets = |window: &Window| window.start < end && window.end() > first;
            let chunks: Vec<usize> = (0..of_chunks.len()).filter(|&k| meets(&of_chunks[k])).collect();
            let length = chunks.len() + corrections * (2 * b).div_ceil(chunk);
            Class { chunks, length }
        };
        (0..channels).step_by(side).map(class).collect()
    }

    /// The plan for windows `[B]`: where each block's pieces begin, and the pieces.
    pub(crate) fn plan(&self, windows: &[Window]) -> Vec<i32> {
        let needed = self.needed(windows);
        self.words(&needed, &self.place_all(&needed))
    }

    /// With the smallest limit, nearly.
    fn place_all(&self, needed: &[Class]) -> Vec<Block> {
        if !self.cuts {
            // The longest first, so that none is left to the end.
            let mut blocks = self.place(needed, usize::MAX / 2, 1).expect("whole tiles find a place");
            blocks.sort_by_key(|block| Reverse(block.load));
            return blocks;
        }
        let tiles: usize = needed.iter().map(|class| class.length + STORE).sum::<usize>() * self.others;
        let mut limit = (tiles + self.biases() * (self.bias_cost() + STORE)).div_ceil(self.blocks());
        loop {
            if let Some(blocks) = [1, 2, 4, 6, 8].into_iter().find_map(|parts| self.place(needed, limit, parts)) {
                return blocks;
            }
            limit += limit.div_ceil(32);
        }
    }

    /// What each block does so that none is at work for much longer than `limit`, where a tile that is cut will have about
    /// `expected` parts; None if that is too short.
    fn place(&self, needed: &[Class], limit: usize, expected: usize) -> Option<Vec<Block>> {
        let class = |tile: usize| &needed[tile % self.classes];
        let count = self.blocks();
        let mut blocks = vec![Block::default(); count];
        // Runs of tiles that are cut off, and where their beginning is.
        let mut line: Vec<(Piece, Option<(usize, usize)>)> = Vec::new();
        for (b, own) in blocks.iter_mut().enumerate() {
            let mut is_cut = false;
            for tile in (b..self.tiles()).step_by(count) {
                let length = class(tile).length;
                let room = limit.saturating_sub(own.load + STORE);
                let head = if !is_cut && length <= room + LEAST {
                    length
                } else if !is_cut && room >= expected * STORE + LEAST {
                    (room - expected * STORE).min(class(tile).chunks.len())
                } else {
                    0
                };
                let kind = Kind::Complete { first: 0, count: 0 };
                if head > 0 || length == 0 {
                    own.pieces.push((0, Piece { tile, from: 0, to: head, kind }));
                    own.load += head + STORE;
                }
                if head < length {
                    let begun = (head > 0).then(|| (b, own.pieces.len() - 1));
                    own.waits |= head > 0;
                    line.push((Piece { tile, from: head, to: length, kind }, begun));
                    is_cut = true;
                }
            }
        }
        let mut least: BinaryHeap<_> = blocks.iter().enumerate().map(|(b, own)| Reverse((own.load, b))).collect();
        for tile in 0..self.biases() {
            let Reverse((load, b)) = least.pop().expect("there are blocks");
            let piece = Piece { tile, from: 0, to: 0, kind: Kind::Bias };
            blocks[b].pieces.push((piece.turn(true), piece));
            blocks[b].load = load + self.bias_cost() + STORE;
            least.push(Reverse((blocks[b].load, b)));
        }
        let (mut helper, mut parts) = (0, 0);
        for (mut left, begun) in line {
            let first = parts;
            while left.from < left.to {
                let room = limit.saturating_sub(blocks.get(helper)?.load + STORE);
                if room < LEAST || blocks[helper].waits {
                    helper += 1;
                    continue;
                }
                let chunks = class(left.tile).chunks.len();
                let mut to = if left.to - left.from < room + LEAST { left.to } else { left.from + room };
                if to > chunks && to < left.to {
                    // Corrections are not cut.
                    to = if left.from < chunks { chunks } else { left.to };
                }
                let is_last = to == left.to;
                let kind = match begun {
                    None if is_last => Kind::Complete { first, count: parts - first },
                    _ => {
                        parts += 1;
                        Kind::Part { part: parts - 1 }
                    }
                };
                let piece = Piece { to, kind, ..left };
                let own = &mut blocks[helper];
                own.pieces.push((piece.turn(false), piece));
                own.load += to - left.from + STORE;
                if let Kind::Complete { count, .. } = kind {
                    own.load += count * STORE;
                }
                own.helps = true;
                left.from = to;
            }
            if let Some((owner, at)) = begun {
                let own = &mut blocks[owner];
                let (turn, piece) = &mut own.pieces[at];
                piece.kind = Kind::Complete { first, count: parts - first };
                *turn = piece.turn(true);
                own.load += (parts - first) * STORE;
            }
        }
        assert!(parts <= count, "{parts} parts of tiles for {count} blocks");
        if blocks.iter().any(|own| own.load > limit + LEAST) {
            return None;
        }
        // Those that others wait for first, in the order of the line.
        blocks.sort_by_key(|block| !block.helps);
        for block in &mut blocks {
            block.pieces.sort_by_key(|(turn, _)| *turn);
        }
        Some(blocks)
    }

    /// As the kernels read it.
    fn words(&self, needed: &[Class], blocks: &[Block]) -> Vec<i32> {
        let Tile { m, n, chunk, .. } = self.tile();
        let Gradient { windows_of_rows, b, t, .. } = self.gradient;
        let mut words = vec![0];
        for block in blocks {
            words.push(words[words.len() - 1] + block.pieces.len() as i32);
        }
        for (_, piece) in blocks.iter().flat_map(|block| &block.pieces) {
            let (class, other) = (piece.tile % self.classes, piece.tile / self.classes);
            let (row, column) = if windows_of_rows { (class * m, other * n) } else { (other * m, class * n) };
            let Class { chunks, length } = &needed[class];
            let row_of = |at: usize| chunks.get(at).map_or(b * t, |k| k * chunk) as i32;
            let (row, column) = (row as i32, column as i32);
            let (start, end) = (if piece.from == 0 { 0 } else { row_of(piece.from) }, row_of(piece.to));
            let more = i32::from(piece.to == *length);
            words.extend(match piece.kind {
                Kind::Bias => [(piece.tile * BIAS_COLUMNS) as i32, -1, 0, 0, 0, -1, 0, 0],
                Kind::Complete { first, count } => [row, column, start, end, more, -1, first as i32, count as i32],
                Kind::Part { part } => [row, column, start, end, more, part as i32, 0, 0],
            });
        }
        assert!(words.len() <= self.lengths().plan, "a plan of {} numbers is longer than planned", words.len());
        words.resize(self.lengths().plan, 0);
        words
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::routing;
    use proptest::prelude::*;

    fn planner(multiprocessors: u32, arch: u32, gradient: Gradient) -> Planner {
        Planner::new(&Device::on_paper("paper", arch, multiprocessors), DType::Bf16, gradient)
    }

    /// Runs a plan as the kernels do, one block after the other: everything is computed once, and a block that waits for a part waits
    /// for one that is there. Returns each block's chunks, with what storing takes.
    fn run(planner: &Planner, windows: &[Window]) -> Vec<usize> {
        let Gradient { rows, columns, windows_of_rows, b, t, corrections, bias } = planner.gradient;
        let Tile { m, n, chunk, .. } = planner.tile();
        let words = planner.plan(windows);
        let lengths = planner.lengths();
        assert_eq!(words.len(), lengths.plan);
        let blocks = planner.blocks();
        let needed = planner.needed(windows);
        let of_tile = |row: usize, column: usize| {
            let class = if windows_of_rows { row / m } else { column / n };
            (column / n + row / m * columns.div_ceil(n), &needed[class])
        };
        let mut done = vec![Vec::new(); planner.tiles()]; // chunks that a tile's owner has
        let mut stored: Vec<Option<(usize, Vec<usize>)>> = vec![None; lengths.counters - 1]; // tile and chunks
        let mut biases = vec![0; rows.div_ceil(BIAS_COLUMNS)];
        let mut loads = Vec::new();
        for block in 0..blocks {
            let mut load = 0;
            for at in words[block]..words[block + 1] {
                let piece: Vec<i32> = words[blocks + 1 + at as usize * WORDS..][..WORDS].to_vec();
                let [row, start, end, first, count] = [0, 2, 3, 6, 7].map(|i| piece[i] as usize);
                load += STORE;
                if piece[1] < 0 {
                    biases[row / BIAS_COLUMNS] += 1;
                    load += planner.bias_cost();
                    continue;
                }
                let (tile, class) = of_tile(row, piece[1] as usize);
                // The last piece may have corrections alone.
                let is_edge = |row: usize| row.is_multiple_of(chunk) || row == b * t;
                assert!(is_edge(start) && is_edge(end) && end <= b * t, "{piece:?}");
                let mut chunks: Vec<usize> =
                    class.chunks.iter().copied().filter(|k| (start..end).contains(&(k * chunk))).collect();
                if piece[4] == 1 {
                    chunks.extend((0..class.length - class.chunks.len()).map(|k| 1_000_000 + k));
                }
                load += chunks.len();
                if piece[5] >= 0 {
                    assert!(stored[piece[5] as usize].replace((tile, chunks)).is_none(), "a part is stored twice");
                    continue;
                }
                for part in first..first + count {
                    load += STORE;
                    let (of, others) = stored[part].as_ref().expect("a part of a block that comes later");
                    assert_eq!(*of, tile);
                    chunks.extend(others);
                }
                chunks.sort_unstable();
                assert!(done[tile].is_empty());
                done[tile] = chunks;
                done[tile].push(usize::MAX);
            }
            loads.push(load);
        }
        for row in (0..rows).step_by(m) {
            for column in (0..columns).step_by(n) {
                let (tile, class) = of_tile(row, column);
                let more = (0..class.length - class.chunks.len()).map(|k| 1_000_000 + k);
                let expected: Vec<usize> = class.chunks.iter().copied().chain(more).chain([usize::MAX]).collect();
                assert_eq!(done[tile], expected, "the tile at {row}, {column}");
                assert!(corrections > 0 || class.length == class.chunks.len());
            }
        }
        assert!(biases.iter().all(|&count| count == usize::from(bias)));
        loads
    }

    proptest! {
        #[test]
        fn everything_is_computed_once(
            [rows, columns] in [1usize..160, 1usize..160],
            // Many samples have corrections that are longer than what is cut.
            (b, t) in prop_oneof![(1usize..40, 1usize..300), (40usize..1000, 1usize..12)],
            multiprocessors in 1u32..140,
            sm_90: bool,
            windows_of_rows: bool,
            seed: u64,
        ) {
            let (rows, columns) = (rows * 16, columns * 16);
            let channels = if windows_of_rows { rows } else { columns };
            let mut state = seed;
            let mut draw = |n: usize| {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                (state >> 33) as usize % n
            };
            let windows: Vec<Window> = (0..b).map(|_| {
                let start = draw(channels);
                Window { start, width: 1 + draw(channels - start) }
            }).collect();
            let (full, some) = (vec![Window::all(channels); b], !windows_of_rows);
            let arch = if sm_90 { 90 } else { 80 };
            for (windows, corrections) in [(&windows, if some { 2 } else { 0 }), (&full, 0)] {
                let bias = some && corrections == 0;
                let gradient = Gradient { rows, columns, windows_of_rows, b, t, corrections, bias };
                run(&planner(multiprocessors, arch, gradient), windows);
            }
        }
    }

    /// The busiest block as against the mean, for the gradients of a block of XL/2 whose tiles are cut.
    #[test]
    fn shares_are_even() {
        let (b, t, c) = (32, 256, 1152);
        for beta in [1.0, 0.8, 0.5] {
            let all = routing::windows(1000, c, 4.0, beta).unwrap();
            let windows: Vec<Window> = (0..b).map(|i| all[(i * 31 + 7) % 1000]).collect();
            let full = beta == 1.0;
            for (rows, columns, windows_of_rows) in
                [(3 * c, c, false), (4 * c, c, false), (c, c, true), (c, 4 * c, true), (32, c, false)]
            {
                let corrections = if full || windows_of_rows { 0 } else { 2 };
                let bias = full && !windows_of_rows;
                let planner = planner(132, 90, Gradient { rows, columns, windows_of_rows, b, t, corrections, bias });
                let loads = run(&planner, &windows);
                if !planner.cuts {
                    assert_eq!((planner.lengths().parts, planner.blocks()), (1, planner.tiles() + planner.biases()));
                    assert!(loads.is_sorted_by(|a, b| a >= b), "beta {beta}: {rows} x {columns}: {loads:?}");
                    continue;
                }
                let (most, sum) = (loads.iter().max().unwrap(), loads.iter().sum::<usize>());
                let mean = sum as f64 / loads.len() as f64;
                println!("beta {beta}: {rows} x {columns}, {} blocks: at most {most}, mean {mean:.1}", loads.len());
                // An owner adds up to 8 parts of the last.
                assert!(
                    *most as f64 <= 1.1 * mean + 8.0 * STORE as f64,
                    "beta {beta}: {rows} x {columns}: {most} of {mean}"
                );
            }
        }
    }
}
