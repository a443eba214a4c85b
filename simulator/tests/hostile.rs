//! Text that nobody should write: an error, never a crash, never unbounded memory.

use cuda_sim::{Arch, Device, LoadError, Options, Sanitizer};
use proptest::prelude::*;
use std::path::Path;
use std::time::{Duration, Instant};

fn load(text: &str) -> Result<(), LoadError> {
    Device::new(Arch::SM_90, Options::default()).load_module(text).map(|_| ())
}

fn body(text: &str) -> String {
    format!(".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry k() {{\n{text}\n}}\n")
}

#[test]
fn refused_with_text_and_line() {
    let e = load(&body(".reg .b32 %r<4>;\nfrobnicate.u32 %r1, %r2;\nret;")).unwrap_err();
    assert_eq!((e.line, e.text.as_str()), (6, "frobnicate.u32 %r1, %r2"));
    for (text, part) in [
        ("add.u32 %r1, %r2, %r3;", "not"),
        (".reg .b32 %r<4>; add.u32 %r1, %r2;", "operands"),
        (".reg .b32 %r<4>; add.strange.u32 %r1, %r2, %r3;", "strange"),
        (".reg .b64 %rd<4>; .reg .b32 %r<4>; add.u32 %r1, %rd2, %r3;", "fit"),
        ("bra NOWHERE;", "NOWHERE"),
        ("L: L: ret;", "twice"),
        (".shared .b8 s[99999999]; ret;", "shared"),
        (".local .b8 s[99999999]; ret;", "local"),
        (".reg .b32 %r<4>; call (%r1), missing, (%r2);", "missing"),
        (
            ".reg .b32 %r<9>; mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r1}, {%r1}, {%r1}, {%r1};",
            "registers",
        ),
    ] {
        let e = load(&body(text)).unwrap_err().to_string();
        assert!(e.contains(part), "{text}: {e}");
    }
}

#[test]
fn hostile_texts() {
    let deep = |open: &str, close: &str, n: usize| body(&format!("{}{}", open.repeat(n), close.repeat(n)));
    let many = (0..20_000).map(|i| format!("add.u32 %r{i}, %r{}, 1;\n", i + 1)).collect::<String>();
    let chain: String = (0..5_000).map(|i| format!(".func f{i}() {{ call f{}, (); ret; }}\n", i + 1)).collect();
    for text in [
        String::new(),
        "\0".repeat(1000),
        body(".reg .b32 %r<99999999999999999999999>; ret;"),
        ".version 8.0\n.target sm_80\n.global .b8 x[18446744073709551615];".into(),
        ".version 8.0\n.target sm_80\n.global .b8 x[99999999999];".into(),
        ".version 8.0\n.target sm_80\n.global .b8 x[4294967296][4294967296][4294967296];".into(),
        deep("{", "}", 100_000),
        body(&format!(".reg .b32 %r<4>; mov.b32 %r1, {}", "{".repeat(100_000))),
        body(&format!("ld.global.u32 %r1, {}", "[".repeat(100_000))),
        body(&format!(".reg .b32 %r<30000>; {}", many)) + "garbage",
        format!(".version 8.0\n.target sm_80\n{chain}.visible .entry k() {{ call f0, (); ret; }}"),
        body("mov.u32"),
        body("@"),
        "/* no end".into(),
        ".version 8.0\n.target sm_80\n.section .debug {".into(),
    ] {
        assert!(load(&text).is_err(), "{}", &text[..text.len().min(80)]);
    }
}

#[test]
fn declared_registers_cost_nothing() {
    load(&body(".reg .b32 %r<18446744073709551615>; mov.u32 %r99999999999, 1; ret;")).unwrap();
}

#[test]
fn offsets_of_parameters_that_no_kernel_has() {
    let text = |load: &str| {
        format!(
            ".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry k(.param .u64 p, .param .u64 q) {{ .reg .b32 %r<4>; {load} ret; }}"
        )
    };
    for load in [
        "ld.param.u32 %r1, [q+9223372036854775807];",
        "ld.param.u32 %r1, [p-4];",
        "ld.param.v2.u32 {%r1, %r2}, [p+4294967295];",
        "ld.param.v2.u32 {%r1, %r2}, [p+4294967292];",
    ] {
        let error = self::load(&text(load)).unwrap_err().to_string();
        assert!(error.contains("outside"), "{load}: {error}");
    }
    self::load(&text("ld.param.v2.u32 {%r1, %r2}, [q-8];")).unwrap();
}

/// What grows with the product of two things in the text is refused, or kept once for all.
#[test]
fn long_lists_used_often() {
    let start = Instant::now();
    let labels: String = (0..20_000).map(|i| format!("L{i}: ")).collect();
    let list = (0..20_000).map(|i| format!("L{i}")).collect::<Vec<_>>().join(", ");
    let jumps = "brx.idx %r1, t;\n".repeat(20_000);
    let error = load(&body(&format!(".reg .b32 %r<4>; t: .branchtargets {list};\n{jumps}{labels} ret;"))).unwrap_err();
    assert!(error.to_string().contains("branch targets"), "{error}");
    // Tables of ordinary size, in many kernels.
    let kernel = format!("() {{ .reg .b32 %r<4>; t: .branchtargets {list}; brx.idx %r1, t; {labels} ret; }}\n");
    let kernels = |n: usize| (0..n).map(|i| format!(".visible .entry k{i}{kernel}")).collect::<String>();
    load(&format!(".version 8.0\n.target sm_80\n.address_size 64\n{}", kernels(3))).unwrap();
    // Functions that all call through a pointer, and whose addresses are all taken.
    let n = 20_000;
    let functions: String =
        (0..n).map(|i| format!(".func f{i}() {{ .reg .b64 %d; mov.u64 %d, f{i}; call %d, (), p; ret; }}\n")).collect();
    let text = format!(
        ".version 8.0\n.target sm_80\n.address_size 64\n{functions}.visible .entry k() {{ call f0, (); ret; }}\n.visible .entry m() {{ call f7, (); ret; }}"
    );
    let module = Device::new(Arch::SM_80, Options::default()).load_module(&text).unwrap();
    assert!(module.function("m").is_some());
    assert!(start.elapsed() < Duration::from_secs(60), "{:?}", start.elapsed());
}

#[test]
fn endless_recursion_is_a_stack_overflow() {
    let text = ".version 8.0\n.target sm_80\n.address_size 64\n.func f() { .local .b8 l[64]; call f, (); ret; }\n.visible .entry k() { call f, (); ret; }";
    let device = Device::new(Arch::SM_80, Options::default());
    let module = device.load_module(text).unwrap();
    let f = module.function("k").unwrap();
    let fault = device.launch(&f, &cuda_sim::LaunchConfig::new([1; 3], [32, 1, 1]), &[]).unwrap_err();
    assert!(fault.text.contains("stack overflow"), "{}", fault.text);
}

fn samples() -> Vec<String> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cases");
    let files = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path().join("kernel.ptx"));
    files.map(|f| std::fs::read_to_string(f).unwrap()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn any_text(text in "\\PC{0,200}") {
        let _ = load(&text);
        let _ = load(&body(&text));
    }

    #[test]
    fn any_tokens(words in prop::collection::vec(prop::sample::select(vec![
        "{", "}", "[", "]", "(", ")", ",", ";", ":", "@", "!", "%r1", "%p1", ".reg", ".b32", ".pred", "add", ".u32", "ld", ".global", "<", ">", "5", "-", "+",
        "0x", "0f3F800000", "L", "bra", ".shared", ".align", "=", "|", "_", "call", ".param", "mov", "\"", "/*", "//", ".v4", "%tid.x",
    ]), 0..60)) {
        let _ = load(&body(&words.join(" ")));
    }

    /// Real kernels with a piece cut out, doubled or replaced.
    #[test]
    fn damaged_kernels(which in 0usize..18, from in any::<prop::sample::Index>(), length in 0usize..40, how in 0u8..4) {
        let text = &samples()[which];
        let start = from.index(text.len());
        let end = (start + length).min(text.len());
        let damaged = match how {
            0 => format!("{}{}", &text[..start], &text[end..]),
            1 => text[..start].to_owned(),
            2 => format!("{}{}{}", &text[..end], &text[start..end], &text[end..]),
            _ => format!("{}{}{}", &text[..start], "%r1, 7 ] {".get(..length % 10).unwrap_or(""), &text[end..]),
        };
        let _ = load(&damaged);
    }
}

/// A tree of statements that mostly make sense: names that exist, operands of the right kind, now and then not.
fn statement() -> impl Strategy<Value = String> {
    let reg = prop::sample::select(vec![
        "%r1",
        "%r2",
        "%r3",
        "%f1",
        "%rd1",
        "%rd2",
        "%p1",
        "%h1",
        "%fd1",
        "%tid.x",
        "7",
        "0f3F800000",
        "s",
        "g",
    ]);
    let ty = prop::sample::select(vec![
        "u32", "s32", "b32", "f32", "u64", "f64", "u16", "f16", "b16", "pred", "u8", "f16x2", "bf16",
    ]);
    let op = prop::sample::select(vec![
        "add",
        "sub.sat",
        "mul.lo",
        "mul.wide",
        "mad.hi",
        "div",
        "rem",
        "min",
        "abs",
        "shl",
        "lop3",
        "prmt",
        "cvt.rn.f32",
        "cvt.rzi.s32",
        "setp.lt",
        "selp",
        "fma.rn",
        "sqrt.approx",
        "mov",
        "ld.global",
        "st.shared",
        "ld.local.v2",
        "atom.global.add",
        "red.shared.cas",
        "shfl.sync.idx",
        "vote.sync.all",
        "bar.sync",
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
        "ldmatrix.sync.aligned.m8n8.x4.shared",
        "bra",
        "brx.idx",
        "call",
        "cp.async.ca.shared.global",
        "mbarrier.init.shared",
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16",
        "bfe",
        "dp4a",
        "slct",
        "testp.finite",
    ]);
    (op, ty, prop::collection::vec(reg, 0..5), 0u8..6, any::<bool>()).prop_map(|(op, ty, regs, shape, guard)| {
        let guard = if guard { "@%p1 " } else { "" };
        let list = regs.join(", ");
        match shape {
            0 | 1 => format!("{guard}{op}.{ty} {list};"),
            2 => format!("{guard}{op}.{ty} {list}, [%rd1+8];"),
            3 => format!("{guard}{op}.{ty} {{{list}}}, [%r1];"),
            4 => format!("{guard}{op}.{ty} [s+4], {{{list}}};"),
            _ => format!("{{ L: {guard}{op}.{ty} {list}; bra L; }}"),
        }
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    /// Whatever loads also runs to some end, within its budget.
    #[test]
    fn random_kernels_end(statements in prop::collection::vec(statement(), 1..6)) {
        let declarations = ".reg .pred %p<4>; .reg .b32 %r<8>; .reg .b64 %rd<8>; .reg .f32 %f<8>; .reg .b16 %h<4>; .reg .f64 %fd<4>; .shared .align 16 .b8 s[64]; mov.u64 %rd1, g; mov.u32 %r1, s;";
        let text = format!(".version 8.5\n.target sm_90a\n.address_size 64\n.global .align 16 .b8 g[64];\n.visible .entry k() {{\n{declarations}\n{}\nret;\n}}\n", statements.join("\n"));
        let device = Device::new(Arch::SM_90, Options { budget: 2000, ..Options::default() });
        if let Ok(module) = device.load_module(&text) {
            let _ = device.launch(&module.function("k").unwrap(), &cuda_sim::LaunchConfig::new([2, 1, 1], [40, 1, 1]), &[]);
        }
    }
}

/// Loads and launches with a limit on the time.
fn quickly(text: &str, threads: u32) -> Result<(), String> {
    quickly_in(text, 5000, threads)
}

fn quickly_in(text: &str, blocks: u32, threads: u32) -> Result<(), String> {
    let start = Instant::now();
    let device = Device::new(Arch::SM_80, Options { budget: 100_000, ..Options::default() });
    let result = device.load_module(text).map_err(|e| e.to_string()).and_then(|m| {
        let config = cuda_sim::LaunchConfig::new([blocks, 1, 1], [threads, 1, 1]);
        device.launch(&m.function("k").unwrap(), &config, &[]).map(|_| ()).map_err(|e| e.to_string())
    });
    assert!(start.elapsed() < Duration::from_secs(60));
    result
}

#[test]
fn greedy_kernels_need_bounded_memory() {
    // The most local memory, in the most threads, of blocks that all wait for something that never comes.
    let wait = "L: ld.volatile.global.u32 %r1, [g]; setp.eq.u32 %p1, %r1, 0; @%p1 bra L;";
    let text = |bytes: u32, body: &str| {
        format!(
            ".version 8.0\n.target sm_80\n.address_size 64\n.global .u32 g;\n.visible .entry k() {{ .reg .b32 %r<4>; .reg .pred %p<2>; .local .align 4 .b8 l[{bytes}];\nst.local.u32 [l], 1;\n{body}\nret; }}"
        )
    };
    let error = quickly(&text(500_000, wait), 256).unwrap_err();
    assert!(error.contains("timeout") || error.contains("host memory"), "{error}");
    let error = quickly(&text(4096, wait), 32).unwrap_err();
    assert!(error.contains("timeout"), "{error}");
    // Recursion without end, each call with much local memory.
    let deep = ".version 8.0\n.target sm_80\n.address_size 64\n.func f() { .local .b8 l[100000]; call f, (); ret; }\n.visible .entry k() { call f, (); ret; }";
    assert!(quickly(deep, 64).unwrap_err().contains("stack overflow"));
    // A label that jumps to itself.
    let own = ".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry k() { L: bra L; }";
    assert!(quickly(own, 32).unwrap_err().contains("timeout"));
    // Calls count for all blocks that exist at once: each of these goes deep, and waits there for all others.
    let deep = ".version 8.0\n.target sm_80\n.address_size 64\n.global .u32 g;\n\
        .func f(.reg .b32 n) { .local .b8 l[60000]; .reg .b32 %m; .reg .pred %p; setp.eq.u32 %p, n, 0; @%p bra W; sub.u32 %m, n, 1; call f, (%m); ret;\n\
        W: red.global.add.u32 [g], 1; L: ld.volatile.global.u32 %m, [g]; setp.lt.u32 %p, %m, 6400; @%p bra L; ret; }\n\
        .visible .entry k() { .reg .b32 %r; mov.u32 %r, 7; call f, (%r); ret; }";
    let error = quickly_in(deep, 200, 32).unwrap_err();
    assert!(error.contains("timeout") || error.contains("stack overflow"), "{error}");
}

#[test]
fn copies_that_nobody_waits_for_need_bounded_memory() {
    let launch = |body: &str| {
        let text = format!(
            ".version 8.0\n.target sm_90a\n.address_size 64\n.global .align 16 .b8 g[4096];\n.visible .entry k() {{ .reg .b32 %r<4>; .reg .b64 %rd<4>; .reg .pred %p<2>;\n\
             .shared .align 16 .b8 s[4096]; .shared .align 8 .b64 b; mov.u64 %rd1, g; mov.u32 %r1, s; mov.u32 %r2, %tid.x; shl.b32 %r2, %r2, 4; add.u32 %r2, %r2, %r1;\n{body}\nret; }}"
        );
        // Findings about the targets of copies would come before the end; readings are kept for their check only.
        let sanitizer = Sanitizer { async_copies: body.contains("bulk_group"), ..Sanitizer::OFF };
        let device = Device::new(Arch::SM_90, Options { budget: 1_000_000, sanitizer, ..Options::default() });
        let module = device.load_module(&text).unwrap_or_else(|e| panic!("{e}"));
        device.launch(&module.function("k").unwrap(), &cuda_sim::LaunchConfig::new([1; 3], [32, 1, 1]), &[])
    };
    let load = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%rd1], 4096, [b];";
    let store = "cp.async.bulk.global.shared::cta.bulk_group [%rd1], [%r1], 4096;";
    let copy = "cp.async.ca.shared.global [%r2], [%rd1], 16;";
    let times = |n: u32, before: &str, body: &str| {
        format!("{before} mov.u32 %r3, 0; L: {body} add.u32 %r3, %r3, 1; setp.lt.u32 %p1, %r3, {n}; @%p1 bra L;")
    };
    let init = "mbarrier.init.shared.b64 [b], 1;";
    for (before, body) in [
        ("", copy.to_owned()),
        (init, load.to_owned()),
        (init, format!("{copy} cp.async.mbarrier.arrive.shared.b64 [b];")),
        ("", format!("{store} cp.async.bulk.commit_group;")),
    ] {
        let error = launch(&times(200_000, before, &body)).unwrap_err().text;
        assert!(error.contains("nobody has waited for"), "{body}: {error}");
    }
    // With waits between, or with a mbarrier that begins anew, there may be as many.
    for (n, body) in [
        (60_000, format!("{copy} cp.async.commit_group; cp.async.wait_group 0;")),
        (2_000, format!("{store} cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;")),
        (1_000, format!("{init} {load} mbarrier.inval.shared.b64 [b];")),
    ] {
        launch(&times(n, "", &body)).unwrap_or_else(|e| panic!("{body}: {e}"));
    }
}

/// Case directories that nobody should write.
#[test]
fn hostile_cases() {
    let good = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cases/cu_atomics_sm80");
    let manifest = std::fs::read_to_string(good.join("manifest.json")).unwrap();
    let root = Path::new(env!("CARGO_TARGET_TMPDIR")).join("hostile_cases");
    let _ = std::fs::remove_dir_all(&root);
    let run = |name: &str, edit: &dyn Fn(&Path)| {
        let dir = root.join(name);
        std::fs::create_dir_all(&dir).unwrap();
        for f in ["kernel.ptx", "manifest.json", "inputs.safetensors", "expected.safetensors"] {
            std::fs::copy(good.join(f), dir.join(f)).unwrap();
        }
        edit(&dir);
        cuda_sim::case::run(&dir, None, Options::default()).is_ok_and(|o| o.passed)
    };
    assert!(run("unchanged", &|_| {}));
    // More memory than any case needs.
    for (key, value) in
        [("buffers", r#"{"x": {"bytes": 40000000000, "init": "fill_0xFF"}}"#), ("bytes_per_block", "4294967296")]
    {
        let dir = root.join("unchanged");
        let mut m: serde_json::Value = serde_json::from_str(&manifest).unwrap();
        let place = if key == "buffers" { &mut m } else { &mut m["params"][0] };
        place[key] = serde_json::from_str(value).unwrap();
        std::fs::write(dir.join("manifest.json"), m.to_string()).unwrap();
        let error = cuda_sim::case::run(&dir, None, Options::default()).unwrap_err();
        assert!(error.ends_with("bytes of buffers and scratch are too many"), "{error}");
    }
    let files = ["kernel.ptx", "manifest.json", "inputs.safetensors", "expected.safetensors"];
    for file in files {
        assert!(!run(&format!("without_{file}"), &|d| std::fs::remove_file(d.join(file)).unwrap()), "{file}");
        assert!(!run(&format!("empty_{file}"), &|d| std::fs::write(d.join(file), "").unwrap()), "{file}");
        assert!(!run(&format!("noise_{file}"), &|d| std::fs::write(d.join(file), [0xff; 300]).unwrap()), "{file}");
        assert!(
            !run(&format!("half_{file}"), &|d| {
                let bytes = std::fs::read(d.join(file)).unwrap();
                std::fs::write(d.join(file), &bytes[..bytes.len() / 2]).unwrap();
            }),
            "{file}"
        );
    }
    for (i, (key, value)) in [
        ("grid", "[0, 1, 1]"),
        ("grid", "[4294967295, 65536, 1]"),
        ("grid", "[4294967295, 4294967295, 4294967295]"),
        ("grid", "[-1, 1, 1]"),
        ("block", "[2048, 1, 1]"),
        ("block", "[0, 0, 0]"),
        ("cluster", "[2, 1, 1]"),
        ("shared_dynamic_bytes", "4294967295"),
        ("entry", "\"nothing\""),
        ("target", "\"sm_20\""),
        ("params", "[]"),
        ("buffers", "{}"),
        ("buffers", "{\"x\": {\"bytes\": 1152921504606846976, \"init\": \"fill_0xFF\"}}"),
        ("outputs", "{}"),
        ("outputs", "{\"nothing\": {\"atol\": 0, \"rtol\": 0}}"),
        ("negative", "\"oob_global\""),
        ("negative", "\"no such class\""),
    ]
    .into_iter()
    .enumerate()
    {
        let changed = run(&format!("edit_{i}"), &|d| {
            let mut m: serde_json::Value = serde_json::from_str(&manifest).unwrap();
            m[key] = serde_json::from_str(value).unwrap();
            std::fs::write(d.join("manifest.json"), m.to_string()).unwrap();
        });
        assert!(!changed, "{key}: {value}");
    }
}
