// Validates compose files with the parser that docker compose itself uses.
//
//	go run . -env ../../.env.example ../../docker-compose.yml
//
// Every profile is switched on, so that no service is left out. Variables come from the -env file alone; those it leaves
// empty are secrets: each file is also read without them, and must then be refused where it uses one. Exit status 1 and
// one line a fault where something is wrong.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/compose-spec/compose-go/v2/cli"
	"github.com/compose-spec/compose-go/v2/dotenv"
	"github.com/compose-spec/compose-go/v2/types"
)

func main() {
	envFile := flag.String("env", "", "file of variables; what it leaves empty is a secret")
	flag.Parse()
	if *envFile == "" || flag.NArg() == 0 {
		fmt.Fprintln(os.Stderr, "usage: compose_check -env FILE COMPOSE_FILE...")
		os.Exit(2)
	}
	variables, err := dotenv.Read(*envFile)
	if err != nil {
		fmt.Fprintf(os.Stderr, "error: cannot read %s: %v\n", *envFile, err)
		os.Exit(2)
	}
	failed := false
	for _, file := range flag.Args() {
		project, err := check(file, variables)
		if err != nil {
			fmt.Fprintf(os.Stderr, "%s: %v\n", file, err)
			failed = true
			continue
		}
		fmt.Printf("%s: %s\n", file, strings.Join(describe(project), ", "))
	}
	if failed {
		os.Exit(1)
	}
}

// check reads one file with every secret filled in, and again without each secret that the file names.
func check(file string, variables map[string]string) (*types.Project, error) {
	filled := map[string]string{}
	var secrets []string
	for name, value := range variables {
		filled[name] = value
		if value == "" {
			filled[name] = "placeholder"
			secrets = append(secrets, name)
		}
	}
	project, err := load(file, filled)
	if err != nil {
		return nil, err
	}
	slices.Sort(secrets)
	for _, name := range secrets {
		used, err := uses(file, name)
		if err != nil {
			return nil, err
		}
		if !used {
			continue
		}
		without := map[string]string{}
		for other, value := range filled {
			without[other] = value
		}
		without[name] = ""
		if _, err := load(file, without); err == nil {
			return nil, fmt.Errorf("the secret %s may be left empty: write ${%s:?...}", name, name)
		} else if !strings.Contains(err.Error(), name) {
			return nil, fmt.Errorf("without the secret %s: expected an error that names it, got: %w", name, err)
		}
	}
	return project, nil
}

// load resolves a file as `docker compose` does, in the file's own folder. A .env file there is not read.
func load(file string, variables map[string]string) (*types.Project, error) {
	var pairs []string
	for name, value := range variables {
		pairs = append(pairs, name+"="+value)
	}
	options, err := cli.NewProjectOptions(
		[]string{file},
		cli.WithWorkingDirectory(filepath.Dir(file)),
		cli.WithEnv(pairs),
		cli.WithName("asi-arch"),
		cli.WithProfiles([]string{"*"}),
	)
	if err != nil {
		return nil, err
	}
	return options.LoadProject(context.Background())
}

// uses says whether a file requires a variable: directly, or in a file that it includes.
func uses(file, name string) (bool, error) {
	options, err := cli.NewProjectOptions([]string{file}, cli.WithWorkingDirectory(filepath.Dir(file)), cli.WithName("x"),
		cli.WithInterpolation(false), cli.WithProfiles([]string{"*"}))
	if err != nil {
		return false, err
	}
	model, err := options.LoadModel(context.Background())
	if err != nil {
		return false, err
	}
	return strings.Contains(fmt.Sprint(model), "${"+name), nil
}

// describe names the services of a project in order, each with its image or build target and published ports.
func describe(project *types.Project) []string {
	var lines []string
	for _, name := range project.ServiceNames() {
		service := project.Services[name]
		line := name + " ("
		if service.Build != nil {
			line += "target " + service.Build.Target
		} else {
			line += service.Image
		}
		for _, port := range service.Ports {
			line += fmt.Sprintf(", %s:%s->%d", port.HostIP, port.Published, port.Target)
		}
		lines = append(lines, line+")")
	}
	return lines
}
