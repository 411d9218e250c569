//! `muster simulate` as a program. Of the papers' figures it tests ranges and orderings: their set-ups
//! leave inputs open, which the scenarios name.

use std::process::Command;

use serde_json::Value;

const EXAMPLE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../examples/plan.toml");

fn muster(args: &[&str]) -> (i32, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_muster"))
        .arg("simulate")
        .args(args)
        .output()
        .expect("muster starts");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("text");
    let code = output.status.code().expect("no signal");
    (code, text(output.stdout), text(output.stderr))
}

fn json(args: &[&str]) -> Value {
    let (code, out, err) = muster(&[args, &["--json"]].concat());
    assert_eq!((code, err.as_str()), (0, ""));
    assert!(!out.contains("NaN"));
    serde_json::from_str(&out).expect("JSON")
}

fn attempt<'v>(found: &'v Value, case: &str, approach: &str) -> &'v Value {
    let cases = found["cases"].as_array().expect("cases");
    let case = cases.iter().find(|found| found["case"] == case);
    let attempts = case.expect("the case")["approaches"].as_array();
    let mut attempts = attempts.expect("approaches").iter();
    let found = attempts.find(|found| found["approach"] == approach);
    found.expect("the approach")
}

fn simulated(found: &Value, case: &str, approach: &str, figure: &str) -> f64 {
    let value = &attempt(found, case, approach)["simulated"][figure];
    value.as_f64().expect("a number")
}

/// A comparison's `ours / paper` is in `range`.
fn near(found: &Value, figure: &str, approach: &str, range: std::ops::RangeInclusive<f64>) {
    let rows = found["comparisons"].as_array().expect("comparisons");
    let rows = rows.iter().filter(|row| {
        row["figure"] == figure && row["approach"] == approach && row["to"].is_null()
    });
    let mut seen = 0;
    for row in rows {
        let (ours, paper) = (row["simulated"].as_f64(), row["paper"].as_f64());
        let ratio = ours.expect("simulated") / paper.expect("printed");
        assert!(range.contains(&ratio), "{row} {ratio}");
        seen += 1;
    }
    assert!(seen > 0, "{figure} {approach}");
}

#[test]
fn rates_tuned_by_hand_do_not_reach_comma() {
    let found = json(&["comma-table-3"]);
    for approach in [
        "sequential, frontend first",
        "sequential, backend first",
        "parallel 32/32",
        "parallel 16/32",
        "parallel 5/10",
        "comma",
    ] {
        near(&found, "completion", approach, 0.9..=1.1);
    }
    for approach in [
        "sequential, frontend first",
        "parallel 32/32",
        "parallel 16/32",
    ] {
        near(&found, "impact", approach, 0.75..=1.25);
    }
    let of = |approach, figure| simulated(&found, "50 clients", approach, figure);
    let impact = |approach| of(approach, "impact_bytes");
    assert!(impact("sequential, frontend first") > impact("sequential, backend first"));
    assert!(impact("sequential, backend first") > impact("parallel 5/10"));
    // The limit of 16 MB/s is above the bottleneck.
    assert!((impact("parallel 32/32") / impact("parallel 16/32") - 1.0).abs() < 0.01);
    assert!(impact("parallel 32/32") > 5.0 * impact("parallel 5/10"));
    assert!(impact("comma") <= 200_000.0 && impact("muster") <= 200_000.0);
    let time = |approach| of(approach, "completion_s");
    assert!(time("comma") <= 1.01 * time("parallel 32/32"));
    assert!(time("muster") <= 1.01 * time("comma"));
    assert!(time("parallel 5/10") > 1.5 * time("comma"));
}

#[test]
fn placements_matter_to_all_but_the_sequential() {
    let found = json(&["comma-table-2"]);
    near(&found, "completion", "sequential", 0.9..=1.25);
    near(&found, "completion", "comma", 0.9..=1.5);
    let cases = found["cases"].as_array().expect("cases");
    assert_eq!(cases.len(), 6);
    let whole = simulated(&found, "{web,app1,app2,db}", "comma", "completion_s");
    for case in cases {
        let name = case["case"].as_str().expect("a name");
        let of = |approach, figure| simulated(&found, name, approach, figure);
        let impact = |approach| of(approach, "impact_bytes");
        assert!(impact("sequential") > 1.2 * impact("parallel"), "{name}");
        assert!(
            impact("comma") <= 7e6 && impact("muster") <= 7e6,
            "{name}: at most the paper's"
        );
        let time = |approach| of(approach, "completion_s");
        let slower = time("comma") / time("parallel");
        assert!((0.9..1.3).contains(&slower), "{name} {slower}");
        if name != "{web,app1,app2,db}" {
            assert!(time("sequential") > 1.5 * time("comma"), "{name}");
            assert!(time("comma") < 0.75 * whole, "{name}");
        }
    }
}

#[test]
fn up_to_five_vms_finish_together_and_more_do_not_fit() {
    let found = json(&["comma-table-5"]);
    for vms in 2..=9 {
        let case = format!("{vms}VM");
        let impact = |approach| simulated(&found, &case, approach, "impact_bytes") / 1e6;
        let (brute, heuristic) = (impact("brute force"), impact("heuristic"));
        let parallel = attempt(&found, &case, "parallel");
        if vms <= 5 {
            assert_eq!((brute, heuristic), (0.0, 0.0), "{case}");
            assert!((0.5..20.0).contains(&impact("parallel")), "{case}");
        } else {
            let reason = parallel["reason"].as_str().expect("said");
            assert!(parallel["simulated"].is_null() && reason.contains("Eq. 3"));
            assert!(brute > 0.0 && brute <= heuristic * 1.01, "{case}");
            assert!(impact("muster") <= brute * 1.05, "{case}");
        }
        assert!(impact("sequential") > 10.0 * heuristic.max(1.0), "{case}");
        // Where the planner predicts, the simulator agrees.
        for approach in ["brute force", "heuristic", "sequential"] {
            let ours = attempt(&found, &case, approach);
            let planned = ours["planned"]["completion_s"].as_f64().expect("planned");
            let time = simulated(&found, &case, approach, "completion_s");
            assert!((time / planned - 1.0).abs() < 0.02, "{case} {approach}");
        }
    }
    for row in found["comparisons"].as_array().expect("comparisons") {
        // INF here is INF there.
        assert_eq!(row["paper"].is_null(), row["simulated"].is_null(), "{row}");
    }
}

#[test]
fn rubbos_moves_as_the_text_says() {
    let found = json(&["vmbuddies-figures-13-15"]);
    let time = |case: &str, approach| simulated(&found, case, approach, "completion_s");
    for load in ["D&H", "S&L", "L&SW"] {
        for bandwidth in ["40", "400"] {
            let case = format!("{load} at {bandwidth} Mbit/s");
            for approach in ["LLL", "OBA", "LLL+MO", "OBA+MO"] {
                assert_eq!(simulated(&found, &case, approach, "split_s"), 0.0);
            }
            for approach in ["NS", "MO"] {
                assert!(simulated(&found, &case, approach, "split_s") > 0.0);
            }
            // (2) of 5.4: MO is less work.
            for (plain, better) in [("NS", "MO"), ("LLL", "LLL+MO"), ("OBA", "OBA+MO")] {
                assert!(time(&case, better) < time(&case, plain), "{case} {plain}");
            }
        }
        let at = |bandwidth: &str| time(&format!("{load} at {bandwidth} Mbit/s"), "NS");
        assert!(at("40") > 5.0 * at("400"), "{load}");
    }
    for bandwidth in ["40", "400"] {
        let case = format!("D&H at {bandwidth} Mbit/s");
        let vms = attempt(&found, &case, "NS")["vms"].as_array();
        let vms = vms.expect("VMs");
        // 5.4: the database ends by traffic, above 3 GB; the application server by rounds.
        assert_eq!(vms[2]["end"], "traffic", "{case}");
        assert!(vms[2]["traffic_bytes"].as_f64().expect("bytes") > 3e9);
        assert_eq!(vms[1]["end"], "rounds", "{case}");
        assert!(time(&case, "NS") > time(&format!("S&L at {bandwidth} Mbit/s"), "NS"));
    }
    // (1) of 5.4.
    assert!(time("D&H at 400 Mbit/s", "OBA") < 0.9 * time("D&H at 400 Mbit/s", "LLL"));
    assert!(time("D&H at 400 Mbit/s", "OBA") > time("D&H at 400 Mbit/s", "NS"));
    // 5.3: 1478 s and 880 s.
    let gain = time("D&H at 40 Mbit/s", "OBA+MO") / time("D&H at 40 Mbit/s", "NS");
    assert!((0.45..0.75).contains(&gain), "{gain}");
}

#[test]
fn a_file_is_moved_by_every_policy() {
    let found = json(&[EXAMPLE]);
    let keys = |value: &Value| -> Vec<String> {
        let object = value.as_object().expect("an object");
        object.keys().cloned().collect()
    };
    assert_eq!(
        keys(&found),
        [
            "cases",
            "comparisons",
            "open",
            "scenario",
            "schema_version",
            "source",
            "title"
        ]
    );
    assert_eq!(found["schema_version"], 1);
    let attempts = found["cases"][0]["approaches"].as_array().expect("all");
    assert_eq!(attempts.len(), 6);
    let amounts = [
        "completion_s",
        "downtime_s",
        "impact_bytes",
        "split_s",
        "traffic_bytes",
    ];
    for found in attempts {
        assert!(found["policy"].is_string() && found["termination"] == "intelligent");
        assert_eq!(found["vms"].as_array().map(Vec::len), Some(4), "{found}");
        assert_eq!(keys(&found["simulated"]), amounts);
        assert_eq!(keys(&found["planned"]), amounts);
    }
    let only = json(&["--policy", "muster", "--termination", "qemu", EXAMPLE]);
    let attempts = only["cases"][0]["approaches"].as_array().expect("one");
    assert_eq!(
        (attempts.len(), &attempts[0]["policy"]),
        (1, &Value::from("muster"))
    );
}

#[test]
fn scenarios_are_listed_and_nonsense_is_refused() {
    let (code, out, _) = muster(&["--list"]);
    assert_eq!(code, 0);
    for name in [
        "comma-table-2",
        "comma-table-3",
        "comma-table-5",
        "vmbuddies-figure-16",
    ] {
        assert!(out.contains(name), "{out}");
    }
    let (code, out, _) = muster(&["comma-table-3"]);
    assert_eq!(code, 0);
    for needle in ["COMMA 4.5, Table 3", "(FITTED)", "/ paper", "leaves open"] {
        assert!(out.contains(needle), "{needle} in {out}");
    }
    for (args, needle) in [
        (&["comma-table-4"][..], "the scenarios are comma-table-2"),
        (&["no-such.toml"], "no-such.toml"),
        (
            &["--policy", "lll", "comma-table-3"],
            "its policies are sequential",
        ),
        (&[], "required"),
    ] {
        let (code, _, err) = muster(args);
        assert!(code == 1 && err.contains(needle), "{args:?} {err}");
    }
}

#[test]
fn a_larger_window_is_no_slower_and_sends_about_as_much() {
    let found = json(&["vmbuddies-figure-16"]);
    let of = |case: &str, window, figure| simulated(&found, case, window, figure);
    let cases = found["cases"].as_array().expect("cases");
    for case in cases.iter().filter_map(|case| case["case"].as_str()) {
        let small = |figure| of(case, "window 5 s", figure);
        for window in ["window 10 s", "window 30 s", "window 60 s", "window 120 s"] {
            assert_eq!(of(case, window, "split_s"), 0.0);
            let time = of(case, window, "completion_s") / small("completion_s");
            let traffic = of(case, window, "traffic_bytes") / small("traffic_bytes");
            assert!(time < 1.03, "{case} {window} {time}");
            assert!((0.9..1.1).contains(&traffic), "{case} {window} {traffic}");
        }
        // 5.5: the changing load costs more than the steady one.
        let steady = of("S&L", "window 30 s", "completion_s");
        assert!(of(case, "window 30 s", "completion_s") >= steady, "{case}");
    }
}
