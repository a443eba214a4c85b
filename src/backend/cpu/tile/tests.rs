//! The kernels against chains of additions, and what they refuse.

use super::super::aligned::AlignedVec;
use super::super::numbers;
use super::super::split::by_parts;
use super::*;

/// All sizes of a tile in all layouts, with the inner dimension in parts, empty ones and those of more than a step too, from
/// nothing and added: the bits are those of one chain of additions.
fn check<const FMA: bool>(
    kernel: impl Fn(&mut [[f32; PANEL]], bool, usize, Rows, usize, &[Segment]),
    most_rows: usize,
    step_rows: usize,
) {
    let apart = |inner| Rows { row: 1, inner, step: 700 };
    let (a, b) = (numbers(1, 12_000), numbers(2, 640 * PANEL));
    let lens: [&[usize]; 14] = [
        &[],
        &[0],
        &[0, 5],
        &[1],
        &[25],
        &[37],
        &[3, 0, 11],
        &[128],
        &[129],
        &[99, 29],
        &[128, 128],
        &[300],
        &[99, 30, 260, 5],
        &[500],
    ];
    for rows in 1..=most_rows {
        // Where the first row of the step that holds a row is, and the row in that step.
        let steps: Vec<_> = even_parts(rows, step_rows, 1).enumerate().collect();
        let in_step = |i: usize, layout: Rows| match steps.iter().find(|(_, step)| step.contains(&i)) {
            Some((number, step)) if layout.step > 0 => (number * layout.step, i - step.start),
            _ => (0, i),
        };
        for (halves, layout) in [
            (1, Rows::lines(STRIP)),
            (2, Rows::lines(45)),
            (1, Rows::interleaved(16)),
            (2, Rows::interleaved(17)),
            (1, apart(16)),
            (2, apart(6)),
            (2, apart(16)),
        ] {
            for (case, lens) in lens.iter().enumerate() {
                let (stride, add) = ([HALF, 33, 35][case % 3], (rows + case).is_multiple_of(2));
                let mut tile = Tile { rows: [[f32::NAN; PANEL]; MAX_ROWS] };
                if add {
                    tile.rows[..rows].fill(std::array::from_fn(|j| j as f32 - 7.3));
                }
                let segments: Vec<_> = lens
                    .iter()
                    .enumerate()
                    .map(|(s, &len)| {
                        let right = if halves == 2 { &b[3000 + 9 * s..] } else { &[] };
                        Segment { a: &a[5 * s..], b: [&b[7 * s..], right], len }
                    })
                    .collect();
                kernel(&mut tile.rows[..rows], add, halves, layout, stride, &segments);
                for (i, j) in (0..rows).flat_map(|i| (0..halves * HALF).map(move |j| (i, j))) {
                    let (first, row) = in_step(i, layout);
                    let mut expected = if add { j as f32 - 7.3 } else { 0.0 };
                    for segment in &segments {
                        for k in 0..segment.len {
                            let (a, b) = (
                                segment.a[first + row * layout.row + k * layout.inner],
                                segment.b[j / HALF][k * stride + j % HALF],
                            );
                            expected = if FMA { a.mul_add(b, expected) } else { a * b + expected };
                        }
                    }
                    let got = tile.rows[i][j];
                    assert!(
                        got.to_bits() == expected.to_bits(),
                        "({i}, {j}) of {rows} rows, {halves}, {layout:?}, {stride}, {lens:?}, added: {add}: {got} for {expected}"
                    );
                }
                assert!(tile.rows[rows..].iter().flatten().all(|x| x.is_nan()), "rows beyond the tile are written");
            }
        }
    }
}

#[test]
fn tiles_are_chains_of_additions() {
    check::<{ cfg!(target_arch = "aarch64") }>(
        |rows, add, halves, layout, stride, segments| {
            steps::multiply(rows, add, halves, layout, stride, segments, &[], plain::step)
        },
        MAX_ROWS,
        steps::ROWS,
    );
    #[cfg(target_arch = "x86_64")]
    if level() != Level::Baseline {
        check::<true>(
            |rows, add, halves, layout, stride, segments| {
                // SAFETY: the processor has AVX2; `check` keeps to what `sum_products` checks, and so do the steps.
                steps::multiply(rows, add, halves, layout, stride, segments, &[1.0; 100], |step| unsafe {
                    avx2::step(step)
                })
            },
            MAX_ROWS,
            steps::ROWS,
        );
        for next in [&[][..], &[1.0; 100]] {
            check::<true>(
                |rows, add, halves, layout, stride, segments| {
                    sum_products(rows, add, halves, layout, stride, segments, next);
                },
                tile_rows(),
                step_rows(),
            );
        }
    }
}

/// Rows that start at cache lines and rows that do not, whole and part: the rest of the destination stays as it is.
#[test]
fn tiles_are_written_where_they_belong() {
    let mut tile = Tile::new();
    for (i, x) in tile.rows.as_flattened_mut().iter_mut().enumerate() {
        *x = i as f32 + 1.0;
    }
    for (first, width, stride) in [(0, PANEL, 64), (16, PANEL, 48), (3, PANEL, 64), (0, PANEL, 37), (0, 5, 64)] {
        for streams in [None, Streams::of(usize::MAX)] {
            for rows in [0, 1, MAX_ROWS] {
                let mut to = AlignedVec::zeros(first + MAX_ROWS * stride);
                let what = format!("{rows} rows from {first}, {width} of {stride}, streamed: {}", streams.is_some());
                match &streams {
                    None => write_rows(&mut to[first..], &tile.rows[..rows], width, stride),
                    // SAFETY: `to` is read after the fence of another `Streams`.
                    Some(streams) => unsafe { streams.write_tile(&mut to[first..], &tile, rows, width, stride) },
                }
                drop(Streams(PhantomData));
                for (at, &x) in to.iter().enumerate() {
                    let (i, j) = (at.wrapping_sub(first) / stride, at.wrapping_sub(first) % stride);
                    let inside = at >= first && i < rows && j < width;
                    assert_eq!(x, if inside { tile.rows[i][j] } else { 0.0 }, "{at} of {what}");
                }
            }
        }
    }
    assert!(Streams::of(1 << 20).is_none() && Streams::of(1 << 22).is_some());
}

#[test]
fn tiles_are_transposed() {
    let mut tile = Tile::new();
    for (i, x) in tile.rows.as_flattened_mut().iter_mut().enumerate() {
        *x = i as f32 + 1.0;
    }
    for (rows, width, stride) in (1..=MAX_ROWS).map(|rows| (rows, PANEL - rows % 3, rows + rows % 2)) {
        for add in [false, true] {
            let mut to = vec![0.5; PANEL * stride];
            write_transposed(&mut to, &tile.rows[..rows], width, stride, add);
            for (at, &x) in to.iter().enumerate() {
                let (j, i) = (at / stride, at % stride);
                let old = if add { 0.5 } else { 0.0 };
                let expected = if j < width && i < rows { tile.rows[i][j] + old } else { 0.5 };
                assert_eq!(x, expected, "({i}, {j}) of {rows} rows, {width} columns, {stride}, added: {add}");
            }
        }
    }
}

fn is_refused(rows: usize, halves: usize, layout: Rows, stride: usize, segment: Segment) -> bool {
    let result =
        std::panic::catch_unwind(|| multiply(&mut Tile::new().rows[..rows], halves, layout, stride, &[segment], &[]));
    result.is_err_and(|why| why.downcast_ref() == Some(&"an operand is too short"))
}

#[test]
fn operands_that_are_too_short_are_refused() {
    let numbers = [0.5; 500];
    for halves in 1..=2 {
        let layouts =
            [(Rows::interleaved(16), 16 + 3), (Rows::lines(20), 2 * 20 + 2), (Rows::packed(2), packed_stride() + 3)];
        for (layout, a_len) in layouts {
            for stride in [HALF, 40] {
                let (a, half) = (&numbers[..a_len], &numbers[..stride + HALF]);
                let b = [half, if halves == 2 { half } else { &[] }];
                let refused = |a, b| is_refused(3, halves, layout, stride, Segment { a, b, len: 2 });
                assert!(!refused(a, b), "{halves}, {layout:?}, {stride}");
                assert!(refused(&a[1..], b), "{halves}, {layout:?}, {stride}");
                for short in 0..halves {
                    let mut b = b;
                    b[short] = &half[1..];
                    assert!(refused(a, b), "{halves}, {layout:?}, {stride}, half {short}");
                }
            }
        }
    }
}

/// Distances whose product is 0, were it to wrap.
#[test]
fn strides_that_overflow_are_refused() {
    const FAR: usize = 1 << (usize::BITS - 1);
    let numbers = [0.0; 4 * PANEL];
    for (layout, stride) in [
        (Rows::lines(FAR), PANEL),
        (Rows::interleaved(FAR), PANEL),
        (Rows::lines(1), FAR),
        (Rows::interleaved(1), FAR),
        (Rows::packed(1), FAR),
    ] {
        assert!(
            is_refused(3, 2, layout, stride, Segment { a: &numbers, b: [&numbers; 2], len: 3 }),
            "{layout:?}, {stride}"
        );
    }
    if tile_rows() > step_rows() {
        let (rows, stride) = (step_rows() + 1, packed_stride());
        // Two steps of 4 and 3 rows, counted as if they could be of 6.
        let ends = 2 * stride + stride + step_rows();
        for (len, refused) in [(ends, false), (ends - 1, true)] {
            let segment = Segment { a: &numbers[..len], b: [&numbers; 2], len: 2 };
            assert_eq!(is_refused(rows, 2, Rows::packed(2), HALF, segment), refused, "{len} numbers of two steps");
        }
        let segment = Segment { a: &numbers, b: [&numbers; 2], len: 3 };
        assert!(is_refused(step_rows() + 1, 2, Rows::packed(FAR), PANEL, segment), "steps that are far apart");
    }
    // One row, or one element, has no distances.
    for (rows, layout) in [(1, Rows::lines(FAR)), (3, Rows::interleaved(FAR))] {
        for stride in [PANEL, FAR] {
            let segment = Segment { a: &numbers, b: [&numbers; 2], len: 1 };
            assert!(!is_refused(rows, 2, layout, stride, segment), "{layout:?}, {stride}");
        }
    }
}

#[test]
fn tiles_cover_the_rows_evenly() {
    for (height, at_once) in [(14, 1), (6, 6), (6, 1)] {
        for rows in 0..100 {
            let parts: Vec<_> = even_parts(rows, height, at_once).collect();
            assert_eq!(parts.iter().flat_map(Clone::clone).collect::<Vec<_>>(), (0..rows).collect::<Vec<_>>());
            assert_eq!(parts.len(), rows.div_ceil(height).div_ceil(at_once));
            let lens = || parts.iter().map(Range::len);
            assert!(lens().all(|len| 0 < len && len <= height * at_once));
            if at_once == 1 && rows > 0 {
                assert!(lens().max().unwrap() - lens().min().unwrap() <= 1, "{rows}: {parts:?}");
            }
        }
    }
    assert!(row_tiles(100).all(|tile| tile.len() <= tile_rows()) && tile_rows() <= MAX_ROWS);
}

#[test]
fn products_of_three_parts_are_as_exact_as_those_of_numbers() {
    let ratio = check_products_of_parts(split::EXACT, |x| x);
    println!("root of mean squares of errors, as against a chain of f32 products: {ratio:.2}");
    assert!(ratio <= 0.7);
}

#[test]
fn products_of_one_part_are_as_exact_as_those_of_rounded_numbers() {
    // Each product is exact in f32, so only the order of the sum differs.
    let ratio = check_products_of_parts(split::ROUNDED, split::rounded);
    println!("root of mean squares of errors, as against a chain of f32 products: {ratio:.2}");
    assert!(ratio <= 1.0);
}

#[test]
fn numbers_are_rounded_to_the_nearest_of_bf16_and_nan_stays_nan() {
    for bits in
        (0..u32::MAX - 997).step_by(997).chain([0x7F7F_7FFF, 0x7F7F_8001, 0x7FFF_FFFF, 0xFFFF_8000, 0x7F80_0001])
    {
        let x = f32::from_bits(bits);
        let (got, nearest) = (split::rounded(x), half::bf16::from_f32(x).to_f32());
        let tie = bits & 0xFFFF == 0x8000;
        assert!(got.to_bits() == nearest.to_bits() || got.is_nan() && x.is_nan() || tie, "{x:e}: {got:e}, {nearest:e}");
    }
}

/// The kernels for AMX against their specification, in all sizes, and that against f64, of numbers as `read` gives them; NaN, infinity and
/// numbers whose parts are subnormal come through both. Gives the root of the mean squares of errors, as against a chain of f32 products.
fn check_products_of_parts(parts: usize, read: fn(f32) -> f32) -> f64 {
    const MOST: usize = 4;
    let step = MOST * split::block(parts) + 48;
    let numbers = |seed: usize, n: usize| -> Vec<f32> {
        // From 2^-12 to 2^12, all bits used.
        let any = |i: usize| (i + 7919 * seed).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 16;
        (0..n).map(|i| (any(i) % (1 << 24)) as f32 * 2.0f32.powi((any(i) >> 40) as i32 % 24 - 36)).collect()
    };
    let (registers, mut lines) = (Registers::new(), Lines::new());
    let (mut squares, mut of_plain_squares) = (0.0, 0.0);
    let spoils = [Some(f32::NAN), Some(f32::INFINITY), Some(1e-40), Some(1e-36)].map(|spoil| (2, spoil));
    for (blocks, spoil) in [(1, None), (2, None), (MOST, None)].into_iter().chain(spoils) {
        let len = blocks * split::INNER;
        let (mut a, mut b) = (numbers(1, 32 * len), numbers(2, len * PANEL));
        for (i, a) in a.iter_mut().enumerate().filter(|(i, _)| i % 3 == 0) {
            *a *= if i % 2 == 0 { -1.0 } else { 1.0 };
        }
        if let Some(x) = spoil {
            (a[5 * len + 3], b[7 * PANEL + 20]) = (x, -x);
        }
        let (mut packed_a, mut packed_b) = (vec![f32::NAN; 2 * step], vec![f32::NAN; 2 * split::len(parts, len)]);
        for (number, to) in packed_a.chunks_exact_mut(step).enumerate() {
            let (to, a) = (&mut to[..split::len(parts, len)], &a[number * 16 * len..]);
            by_parts!(parts, P => split::pack_rows::<P>(to, a, 16, len, len));
        }
        by_parts!(parts, P => split::pack_panels::<P>(&mut packed_b, &b, 0, PANEL, len));
        let segment = Segment { a: &packed_a, b: packed_b.split_at(split::len(parts, len)).into(), len };
        for (add, rows, halves) in
            [false, true].into_iter().flat_map(|add| [(9, 1), (16, 2), (17, 1), (32, 2)].map(|(r, h)| (add, r, h)))
        {
            let start = [[if add { 3.0 } else { f32::NAN }; PANEL]; 32];
            let (mut kernel, mut specified) = (start, start);
            lines.add_rows(&b, 3, 40, PANEL);
            multiply_split(&registers, parts, &mut kernel, add, [rows, halves], step, segment, &b[..40], &mut lines);
            split::multiply(parts, &mut specified, add, [rows.div_ceil(16), halves], step, segment, blocks);
            for (i, j) in (0..32).flat_map(|i| (0..PANEL).map(move |j| (i, j))) {
                let (got, of_two) = (kernel[i][j], specified[i][j]);
                let same = got.to_bits() == of_two.to_bits() || got.is_nan() && of_two.is_nan();
                let what = format!("({i}, {j}) of {rows} rows, {halves} halves, {blocks} blocks, add {add}, {spoil:?}");
                assert!(same, "{what}: {got}, specified as {of_two}");
                if i >= rows.next_multiple_of(16) || j >= halves * HALF {
                    assert!(got.to_bits() == start[i][j].to_bits(), "{what} is written");
                    continue;
                }
                let start = if add { 3.0 } else { 0.0 };
                let (mut sum, mut size, mut plain) = (f64::from(start), 0.0, start);
                for k in 0..len {
                    let [a, b] = [a[i * len + k], b[k * PANEL + j]].map(read);
                    sum += f64::from(a) * f64::from(b);
                    size += (f64::from(a) * f64::from(b)).abs();
                    plain = a.mul_add(b, plain);
                }
                assert_eq!(got.is_finite(), plain.is_finite(), "{what}: {got}, {plain}");
                if plain.is_finite() {
                    let [err, of_plain] = [got, plain].map(|x| (f64::from(x) - sum) / size);
                    assert!(err.abs() <= 1e-6, "{what}: {got} for {sum}");
                    (squares, of_plain_squares) = (squares + err * err, of_plain_squares + of_plain * of_plain);
                }
            }
        }
    }
    f64::sqrt(squares / of_plain_squares)
}

#[test]
#[cfg(target_arch = "x86_64")]
fn portions_hold_all_lines() {
    let rows: Vec<f32> = vec![0.0; 3 * 50];
    let mut lines = Lines::new();
    for (count, portions) in [(0, 1), (0, 3), (2, 4), (3, 1), (3, 4), (3, 6), (3, 100), (3, 1000)] {
        lines.add_rows(&rows, count, 40, 50);
        let at = [0, 2 * LINE].into_iter().flat_map(|at| (0..count).map(move |row| row * 50 + at));
        let addresses: Vec<_> = at.map(|at| rows[at..].as_ptr().addr()).collect();
        let (all, of_each) = lines.in_portions(portions);
        assert!(all.len().is_multiple_of(of_each) && all.len() <= portions * of_each);
        assert!(all.starts_with(&addresses) && all.len() < addresses.len() + of_each);
        assert!(all[addresses.len()..].iter().all(|line| Some(line) == addresses.last()));
    }
    (0..2).for_each(|_| lines.add_rows(&rows, 50, 20, 1));
    assert_eq!((lines.in_portions(60).0.len(), lines.in_portions(60).0.len()), (100, 0), "100 in 60 portions, once");
    // More than fit, and rows that are not there.
    (0..5).for_each(|_| lines.add_rows(&rows, 50, 20, 1));
    assert_eq!(lines.in_portions(30).0.len(), Lines::MOST / 50 * 50);
    lines.add_rows(&rows, 7, 20, 50);
    assert_eq!(lines.in_portions(1).0.len(), 3);
}

/// The last that is dropped gives them back, in whatever order.
#[test]
fn registers_stay_until_the_last_is_dropped() {
    let len = split::INNER;
    const PARTS: usize = split::EXACT;
    let of_step = split::len(PARTS, len);
    let (mut a, mut b) = (vec![0.0; of_step], vec![0.0; 2 * of_step]);
    split::pack_rows::<PARTS>(&mut a, &vec![1.0; len], 1, len, len);
    split::pack_panels::<PARTS>(&mut b, &vec![2.0; len * PANEL], 0, PANEL, len);
    let segment = Segment { a: &a, b: b.split_at(of_step).into(), len };
    let multiplies = |registers: &Registers| {
        let mut sums = [[0.0; PANEL]; split::STEP];
        multiply_split(registers, PARTS, &mut sums, false, [1, 2], of_step, segment, &[], &mut Lines::new());
        assert_eq!(sums[0], [2.0 * len as f32; PANEL]);
    };
    for _ in 0..2 {
        let (first, second) = (Registers::new(), Registers::new());
        drop(first);
        assert_eq!(SET_UP.get(), 1);
        multiplies(&second);
        drop(second);
        assert_eq!(SET_UP.get(), 0);
    }
    let panicked = std::panic::catch_unwind(|| {
        let _registers = Registers::new();
        std::panic::resume_unwind(Box::new(()));
    });
    assert!(panicked.is_err() && SET_UP.get() == 0);
}
