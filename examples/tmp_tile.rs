use dtr_fused::backend::cpu::tile::*;
use std::time::Instant;
fn main() {
    // rate of one thread and of two
    for threads in [1, 2] {
        for (k, tiles, npan) in [(64usize, 21usize, 48usize), (192, 21, 48), (384, 21, 48), (384, 10, 48), (384,5,48), (1536, 5, 12), (1536,3,12),(256,1,12),(2048,1,12),(1792,1,12), (2048,2,12)] {
            for rows in [13usize, 14] {
            let mut handles = vec![];
            for _ in 0..threads {
                handles.push(std::thread::spawn(move || {
                    let a = vec![1.0f32; tiles * k * A_STRIDE + 16];
                    let b = vec![1.0f32; npan * k * PANEL + 16];
                    let ao = a.as_ptr().align_offset(64); let bo = b.as_ptr().align_offset(64);
                    let (a, b) = (&a[ao..], &b[bo..]);
                    let mut tile = Tile::new();
                    let mut best = 0f64;
                    for _ in 0..8 {
                        let reps = (1usize<<33) / (2 * rows * 32 * k * tiles * npan) / 8 + 1;
                        let t = Instant::now();
                        for _ in 0..reps {
                            for p in 0..npan { for i in 0..tiles {
                                multiply(&mut tile, rows, 2, Rows::Interleaved(A_STRIDE), &[Segment { a: &a[i*k*A_STRIDE..], b: &b[p*k*PANEL..], len: k }]);
                                std::hint::black_box(&mut tile);
                            } }
                        }
                        let g = (2 * rows * 32 * k * tiles * npan * reps) as f64 / t.elapsed().as_secs_f64() / 1e9;
                        best = best.max(g);
                    }
                    best
                }));
            }
            let r: Vec<f64> = handles.into_iter().map(|h| h.join().unwrap()).collect();
            println!("threads {threads} k {k:5} tiles {tiles:3} panels {npan} rows {rows}: {r:.1?}");
            }
        }
    }
}
