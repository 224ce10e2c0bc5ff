// Writes the dashboard as JSON, to the file that is named or to xnbd.json.
import { writeFileSync } from "node:fs";
import { dashboard } from "./dashboard.js";

writeFileSync(process.argv[2] ?? "xnbd.json", JSON.stringify(dashboard, null, 1) + "\n");
