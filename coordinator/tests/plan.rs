//! `muster plan` as a program: no sidecar, no host.

use std::process::Command;

use serde_json::Value;

const EXAMPLE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../examples/plan.toml");

fn muster(args: &[&str]) -> (i32, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_muster"))
        .args(args)
        .output()
        .expect("muster starts");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("text");
    let code = output.status.code().expect("no signal");
    (code, text(output.stdout), text(output.stderr))
}

fn with(text: &str, test: impl FnOnce(&str)) {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("app.toml");
    std::fs::write(&path, text).expect("written");
    test(&path.display().to_string());
}

fn example() -> String {
    std::fs::read_to_string(EXAMPLE).expect("the example")
}

#[test]
fn stage_two_of_comma_is_exact() {
    let args = [
        "plan", "--policy", "comma", "--stage", "two", "--json", EXAMPLE,
    ];
    for (search, impact, optimal) in [
        ("exact", 2_900_645.161, true),
        ("brute", 2_900_645.161, true),
        ("heuristic", 4_179_591.837, false),
    ] {
        let (code, out, err) = muster(&[&args[..], &["--search", search]].concat());
        assert_eq!((code, err.as_str()), (0, ""));
        let plan: Value = serde_json::from_str(&out).expect("JSON");
        let found = plan["impact_bytes"].as_f64().expect("a number");
        assert!((found - impact).abs() < 0.001, "{search}: {found}");
        assert_eq!(plan["optimal"], optimal);
        assert_eq!(plan["policy"], "comma");
        assert_eq!(plan["others"].as_array().map(Vec::len), Some(5));
    }
}

#[test]
fn a_table_a_timeline_and_a_picture() {
    let dir = tempfile::tempdir().expect("a directory");
    let svg = dir.path().join("plan.svg").display().to_string();
    let (code, out, _) = muster(&["plan", EXAMPLE, "--svg", &svg]);
    assert_eq!(code, 0, "{out}");
    for needle in [
        "shop: policy comma",
        "vmbuddies",
        "completion",
        "impact",
        "█",
        "full height",
    ] {
        assert!(out.contains(needle), "{needle} in {out}");
    }
    let svg = std::fs::read_to_string(svg).expect("written");
    assert!(svg.starts_with("<svg") && svg.contains(">db1</text>"));
}

#[test]
fn a_group_that_cannot_converge_is_a_plan_that_says_so() {
    let slow = example().replace("32MB/s", "14MB/s");
    with(&slow, |file| {
        let (code, out, _) = muster(&["plan", "--json", "--stage", "two", file]);
        assert_eq!(code, 0);
        let plan: Value = serde_json::from_str(&out).expect("JSON");
        assert_eq!(plan["converges"], false);
        assert!(plan["completion_s"].is_null() && plan["impact_bytes"].is_null());
        let reason = plan["reason"].as_str().expect("said");
        assert!(
            reason.contains("VM db1 does not converge even alone"),
            "{reason}"
        );
        assert!(!out.contains("NaN"), "{out}");
        let (code, out, _) = muster(&["plan", "--stage", "two", file]);
        assert!(
            code == 0 && out.contains("comma does not converge: VM db1"),
            "{out}"
        );
    });
}

#[test]
fn bad_files_are_refused_with_line_and_reason() {
    for (from, to, needle) in [
        ("32MB/s", "0MB/s", "`bandwidth` in [application] is 0"),
        ("32MB/s", "-32MB/s", "does not begin with a number"),
        (
            "7.5MB/s",
            "900TB/s",
            "above 100000.00 GB/s; check the number",
        ),
        (
            "7.5MB/s",
            "25MB/s",
            "`dirty-rate` 25.0 MB/s is above `max-dirty-rate`",
        ),
        (
            "name = \"db1\"",
            "name = \"db2\"",
            "[[vm]] `db2` is there twice",
        ),
        (
            "\"web\", \"app\"",
            "\"web\", \"apps\"",
            "there is no VM `apps`; did you mean `app`?",
        ),
        ("dirty-set", "dirty_set", "did you mean `dirty-set`?"),
        ("\"comma\"", "\"coma\"", "expected \"sequential\""),
    ] {
        with(&example().replace(from, to), |file| {
            let (code, _, err) = muster(&["plan", file]);
            assert_eq!(code, 1, "{to}");
            assert!(
                err.contains(needle) && err.contains("app.toml:"),
                "{needle} in {err}"
            );
        });
    }
    with(&example().replace("memory = \"1024MB\"\n", ""), |file| {
        let (code, _, err) = muster(&["plan", file]);
        assert!(
            code == 1 && err.contains("VM db2: `memory` is missing"),
            "{err}"
        );
        assert_eq!(muster(&["plan", "--stage", "two", file]).0, 0);
    });
    assert_eq!(muster(&["plan", "--search", "best", EXAMPLE]).0, 1);
    assert_eq!(muster(&["plan", "--stage", "three", EXAMPLE]).0, 1);
    assert_eq!(
        muster(&["plan", "--svg", "/no/such/place.svg", EXAMPLE]).0,
        1
    );
}

#[test]
fn a_plan_is_no_move() {
    let (code, _, err) = muster(&["run", EXAMPLE]);
    assert_eq!(code, 1);
    assert!(
        err.contains("[[host]]") && err.contains("`uuid` is missing"),
        "{err}"
    );
}

#[test]
fn the_bandwidth_must_be_known_and_the_reserve_is_taken_off_it() {
    let given = "bandwidth = \"32MB/s\"";
    assert!(example().contains(given));
    with(&example().replace(given, ""), |file| {
        let (code, _, err) = muster(&["plan", file]);
        assert!(code == 1 && err.contains("`bandwidth` is missing"), "{err}");
    });
    let reserved = "bandwidth = \"40MB/s\"\nreserve = \"8MB/s\"";
    with(&example().replace(given, reserved), |file| {
        let args = ["plan", "--policy", "comma", "--stage", "two", "--json"];
        let (code, out, _) = muster(&[&args[..], &[file]].concat());
        assert_eq!(code, 0, "{out}");
        let plan: Value = serde_json::from_str(&out).expect("JSON");
        let found = plan["impact_bytes"].as_f64().expect("a number");
        assert!((found - 2_900_645.161).abs() < 0.001, "{found}");
    });
}

const HOSTS: &str = "version = 1\n[application]\nname = \"shop\"\n\
    [[host]]\nname = \"a\"\ncontrol = \"unix:/nonexistent/a\"\n\
    [[host]]\nname = \"b\"\ncontrol = \"unix:/nonexistent/b\"\n\
    [[vm]]\nname = \"db\"\nuuid = \"6f1c1c1e-8a52-4b6e-9a4e-3f0b3a6c1d01\"\n\
    from = \"a\"\nto = \"b\"\nmemory = \"1GB\"\n";

#[test]
fn without_sidecars_it_makes_do_with_the_file() {
    let named = |keys: &str| HOSTS.replace("name = \"shop\"", &format!("name = \"shop\"\n{keys}"));
    let known = HOSTS.to_owned() + "dirty-rate = \"1MB/s\"\nmax-dirty-rate = \"2MB/s\"\n";
    let bandwidth = "name = \"shop\"\nbandwidth = \"32MB/s\"";
    let enough = known.replace("name = \"shop\"", bandwidth);
    with(&enough, |file| {
        let (code, out, err) = muster(&["plan", file]);
        assert_eq!(code, 0, "{err}");
        assert!(out.contains("note: nothing was measured"), "{out}");
    });
    // All of it stands there: nobody is asked.
    with(&(enough + "writable-working-set = \"8MB\"\n"), |file| {
        let (code, out, _) = muster(&["plan", file]);
        assert!(code == 0 && !out.contains("measured"), "{out}");
    });
    for (text, missing) in [
        (known.clone(), "`bandwidth` is missing"),
        (named("bandwidth = \"32MB/s\""), "give `dirty-rate`"),
        (named(""), "no sidecar answers"),
    ] {
        with(&text, |file| {
            let (code, _, err) = muster(&["plan", file]);
            assert!(code == 1 && err.contains(missing), "{missing} in {err}");
        });
    }
}
